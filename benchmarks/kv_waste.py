"""How much of the held KV cache carries no token, over the lengths and arrivals of a trace. Host only: no model.

    python benchmarks/kv_waste.py TRACE.csv --requests 2000

The trace has the columns TIMESTAMP, ContextTokens, GeneratedTokens (as the Azure LLM inference traces do). Each
request arrives when the trace says, on a clock that each step moves on by --step-ms and --token-us a token, and
generates exactly as many tokens as the trace says. Shares are means over steps, taken after each step's update.
"""

import argparse
import csv
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from jpaged.block_manager import BlockManager
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Sequence, SequenceGroup

BLOCK_SIZES = (8, 16, 32, 128)


class Request(NamedTuple):
    """One line of the trace."""

    arrival: float  # seconds after the first
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Result:
    """What one run over the trace measured."""

    waste: dict[str, float]  # share of held slots without a token, by way of holding them
    num_steps: int
    num_preemptions: int
    most_running: int
    host_us: float  # of `schedule` and `update` together, a step


def read_trace(path: Path) -> list[Request]:
    """The trace's requests in order of arrival."""
    with path.open(newline="") as file:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    first = min(when for when, _, _ in rows)
    return sorted(Request((when - first).total_seconds(), prompt, output) for when, prompt, output in rows)


def reservations(max_model_len: int) -> dict[str, Callable[[Request], int]]:
    """Slots reserved up front, in Orca's three ways as arXiv 2309.06180 (6.1) defines them."""
    return {
        "Orca (Oracle)": lambda request: request.prompt_len + request.output_len,
        "Orca (Pow2)": lambda request: request.prompt_len + (1 << (request.output_len - 1).bit_length()),
        f"Orca (Max, {max_model_len})": lambda request: max_model_len,
    }


def make_group(seq_id: int, request: Request) -> SequenceGroup:
    """The trace's request as the scheduler takes it; nothing stops it early."""
    return SequenceGroup(
        request_id=str(seq_id),
        sequences=[Sequence(seq_id=seq_id, index=0, token_ids=[0] * request.prompt_len)],
        params=SamplingParams(max_tokens=request.output_len),
        stop_token_ids=frozenset(),
        seed=0,
        max_len=request.prompt_len + request.output_len,
    )


def simulate(requests: list[Request], block_size: int, args: argparse.Namespace) -> Result:
    """Run the trace through the scheduler. A request's place in `requests` is its sequence's id."""
    blocks = BlockManager(args.num_slots // block_size, block_size)
    scheduler = Scheduler(blocks, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens)
    ways = reservations(args.max_model_len)
    groups = [make_group(seq_id, request) for seq_id, request in enumerate(requests)]
    waiting = deque(range(len(requests)))
    started: set[int] = set()  # and not ended; those preempted among them
    shares: list[list[float]] = []  # a step: paged, then the reservations
    num_steps = most_running = 0
    now = host_seconds = 0.0
    while waiting or scheduler.has_unfinished():
        if not scheduler.has_unfinished():
            now = max(now, requests[waiting[0]].arrival)
        while waiting and requests[waiting[0]].arrival <= now:
            scheduler.add(groups[waiting.popleft()])

        begin = time.perf_counter()
        output = scheduler.schedule()
        scheduler.update(output, [0] * len(output.samples))
        host_seconds += time.perf_counter() - begin
        if output.ended:
            raise SystemExit(f"--num-slots {args.num_slots} is too small: {groups[int(output.ended[0])].error}")

        num_steps += 1
        now += args.step_ms / 1e3 + args.token_us / 1e6 * output.num_tokens
        started.update(new.seq_id for new in output.new_rows)
        started = {seq_id for seq_id in started if groups[seq_id].unfinished()}
        running = [requests[i] for i in started if groups[i].sequences[0].row is not None]
        if running:
            most_running = max(most_running, len(running))
            paged = (blocks.num_blocks - blocks.num_free_blocks) * block_size
            used = paged - scheduler.num_unused_slots
            held = [paged, *(sum(map(way, running)) for way in ways.values())]
            shares.append([1 - used / slots for slots in held])
    means = [fmean(column) for column in zip(*shares, strict=True)]
    return Result(
        dict(zip(["paged", *ways], means, strict=True)),
        num_steps, scheduler.num_preemptions, most_running, host_seconds / num_steps * 1e6,
    )  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, help="only the first so many; without it, all")
    parser.add_argument("--num-slots", type=int, default=65_536, help="of the pool, shared out as blocks")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=8192, help="longer requests are left out")
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of a step")
    parser.add_argument("--token-us", type=float, default=50.0, help="and what each of its tokens adds")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    trace = read_trace(args.trace)[: args.requests]
    requests = [r for r in trace if r.output_len and r.prompt_len + r.output_len <= args.max_model_len]
    console = Console()
    console.print(
        f"{len(requests)} requests ({len(trace) - len(requests)} left out), mean lengths "
        f"{fmean(r.prompt_len for r in requests):.0f} + {fmean(r.output_len for r in requests):.0f}, "
        f"{args.num_slots} slots, {args.max_num_seqs} rows, {args.max_num_batched_tokens} tokens a step"
    )
    results = {block_size: simulate(requests, block_size, args) for block_size in BLOCK_SIZES}

    columns = [str(size) for size in results]
    table = Table("block size", *columns, title="Share of held slots that carry no token")
    for way in next(iter(results.values())).waste:
        table.add_row(way, *(f"{result.waste[way]:.2%}" for result in results.values()))
    table.add_section()
    table.add_row("steps", *(str(result.num_steps) for result in results.values()))
    table.add_row("most requests at once", *(str(result.most_running) for result in results.values()))
    table.add_row("preemptions", *(str(result.num_preemptions) for result in results.values()))
    table.add_row("host time a step, µs", *(f"{result.host_us:.0f}" for result in results.values()))
    console.print(table)


if __name__ == "__main__":
    main()
