"""The host's time a step: `schedule` and `update` together, without a model.

    python benchmarks/scheduler_host.py

Steady decode: so many sequences run, their prompts of all lengths modulo the block size, so that in every step the
same share of them opens a block; prefix caching is on, and every sampled token is random. Admission: requests arrive
at once whose prompts begin with a prefix that is in the cache already.
"""

import argparse
import random
import time
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from jpaged.block_manager import BlockManager
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Sequence, SequenceGroup

VOCAB = 50_000
STOP_TOKEN_IDS = frozenset({VOCAB})  # which is never sampled


def make_group(seq_id: int, token_ids: list[int], max_tokens: int) -> SequenceGroup:
    return SequenceGroup(
        request_id=str(seq_id),
        sequences=[Sequence(seq_id=seq_id, index=0, token_ids=token_ids)],
        params=SamplingParams(max_tokens=max_tokens),
        stop_token_ids=STOP_TOKEN_IDS,
        seed=seq_id,
        max_len=len(token_ids) + max_tokens,
    )


def make_scheduler(num_seqs: int, tokens_each: int, block_size: int, budget: int) -> Scheduler:
    num_blocks = 2 * num_seqs * (tokens_each // block_size + 1)
    blocks = BlockManager(num_blocks, block_size, prefix_caching=True)
    return Scheduler(blocks, max_num_seqs=num_seqs, max_num_batched_tokens=budget)


def random_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(n)]


def time_decode(num_seqs: int, block_size: int, num_steps: int, run_ahead: bool) -> list[float]:
    """Microseconds of each step of steady decode."""
    rng = random.Random(0)
    scheduler = make_scheduler(num_seqs, 160 + num_steps, block_size, budget=num_seqs * 128)
    for seq_id in range(num_seqs):
        scheduler.add(make_group(seq_id, random_tokens(rng, 100 + seq_id % block_size), max_tokens=num_steps + 50))
    times = []
    pending = scheduler.schedule()
    for step in range(num_steps + 20):
        token_ids = random_tokens(rng, len(pending.samples))
        begin = time.perf_counter()
        if run_ahead:
            output = scheduler.schedule()
            scheduler.update(pending, token_ids)
        else:
            scheduler.update(pending, token_ids)
            output = scheduler.schedule()
        elapsed = time.perf_counter() - begin
        pending = output
        if step >= 20:
            assert len(pending.samples) == num_seqs
            times.append(1e6 * elapsed)
    return times


def time_admission(num_seqs: int, prompt_len: int, prefix_len: int, block_size: int) -> float:
    """Milliseconds to admit all, in as many steps as it takes, `update` included."""
    rng = random.Random(0)
    scheduler = make_scheduler(num_seqs, prompt_len, block_size, budget=8192)
    prefix = random_tokens(rng, prefix_len)
    scheduler.add(make_group(-1, [*prefix, 0], max_tokens=1))
    scheduler.update(scheduler.schedule(), [0])
    for seq_id in range(num_seqs):
        scheduler.add(make_group(seq_id, prefix + random_tokens(rng, prompt_len - prefix_len), max_tokens=64))
    elapsed = 0.0
    while scheduler.num_running < num_seqs:
        before = scheduler.num_running
        begin = time.perf_counter()
        output = scheduler.schedule()
        elapsed += time.perf_counter() - begin
        assert scheduler.num_running > before
        token_ids = random_tokens(rng, len(output.samples))
        begin = time.perf_counter()
        scheduler.update(output, token_ids)
        elapsed += time.perf_counter() - begin
    assert scheduler.num_cached_tokens == num_seqs * (prefix_len // block_size * block_size)
    return 1e3 * elapsed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    table = Table(
        "sequences", "steps", "median, µs", "90 % below, µs", title="Steady decode: schedule + update, a step"
    )
    for num_seqs in (64, 256, 1024):
        for run_ahead in (False, True):
            times: list[float] = []
            for _ in range(args.repeats):
                times += time_decode(num_seqs, args.block_size, args.steps, run_ahead)
            way = "one ahead" if run_ahead else "one by one"
            table.add_row(str(num_seqs), way, f"{median(times):.0f}", f"{quantiles(times, n=10)[-1]:.0f}")
    console.print(table)
    admissions = [time_admission(256, 512, 256, args.block_size) for _ in range(args.repeats)]
    console.print(
        f"Admission of 256 prompts of 512 tokens, 256 of them cached: {median(admissions):.1f} ms "
        f"(least {min(admissions):.1f}) for all of the schedule and update calls together"
    )


if __name__ == "__main__":
    main()
