"""How many blocks sharing saves, as the paper counts it. Host only: no model.

    python benchmarks/kv_sharing.py

arXiv 2309.06180 (6.3, figure 15) divides the blocks saved by sharing by those that would be held without it. Requests
of lognormal lengths with the means of the paper's two workloads run through the scheduler and the block manager; each
step counts the blocks of all block tables, and the distinct ones among them. Samples of one request all reach the
request's length. Of a beam's next tokens only the scores matter: the likeliest has a log-probability of -x, and each
that follows another x less, with every x drawn from an exponential distribution whose mean is --spread.
"""

import argparse
import heapq
import math
import random
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from jpaged.block_manager import BlockManager
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Sequence, SequenceGroup

WIDTHS = (2, 4, 6)


class Workload(NamedTuple):
    """Mean lengths (arXiv 2309.06180, figure 11), and the savings in percent that figure 15 reports."""

    prompt_len: float
    output_len: float
    samples: tuple[float | None, ...]  # by width; the text gives only the ends of ShareGPT's
    beams: tuple[float | None, ...]


WORKLOADS = {
    "Alpaca": Workload(19.3, 58.5, (6.1, 8.5, 9.8), (37.6, 53.1, 55.2)),
    "ShareGPT": Workload(161.3, 338.0, (16.2, None, 30.5), (44.3, None, 66.3)),
}


@dataclass
class Saving:
    """Blocks summed over steps."""

    in_tables: int = 0
    held: int = 0
    unused_slots: int = 0

    @property
    def percent(self) -> float:
        return 100 * (1 - self.held / self.in_tables)


class Run:
    """One workload, decoded in one way."""

    def __init__(self, workload: Workload, width: int, is_beam: bool, args: argparse.Namespace) -> None:
        self.rng = random.Random(0)
        self.width, self.is_beam, self.args = width, is_beam, args
        self.seq_ids = count()
        self.blocks = BlockManager(args.num_blocks, args.block_size)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=2048)
        self.scores: dict[int, float] = {}
        self.groups = [self.make_group(workload) for _ in range(args.requests)]

    def make_group(self, workload: Workload) -> SequenceGroup:
        prompt_len, output_len = (self.length(mean) for mean in (workload.prompt_len, workload.output_len))
        n = 1 if self.is_beam else self.width
        seq_ids = [next(self.seq_ids) for _ in range(n)]
        self.scores[seq_ids[0]] = 0.0
        return SequenceGroup(
            request_id=str(seq_ids[0]),
            sequences=[Sequence(seq_id, index, [1] * prompt_len) for index, seq_id in enumerate(seq_ids)],
            params=SamplingParams(n=n, max_tokens=output_len),
            stop_token_ids=frozenset(),
            seed=0,
            max_len=prompt_len + output_len,
            beam_width=self.width if self.is_beam else None,
        )

    def length(self, mean: float) -> int:
        sigma = self.args.sigma
        return max(1, round(self.rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

    def measure(self) -> Saving:
        saving = Saving()
        for group in self.groups:
            self.scheduler.add(group)
        while self.scheduler.has_unfinished():
            output = self.scheduler.schedule()
            running = [s for g in self.groups for s in g.unfinished() if s.num_slots]
            saving.in_tables += sum(len(self.blocks.block_table(s.seq_id)) for s in running)
            saving.held += self.blocks.num_blocks - self.blocks.num_free_blocks
            saving.unused_slots += self.scheduler.num_unused_slots
            for group in self.scheduler.update(output, [1] * len(output.samples)):
                if self.is_beam:
                    self.continue_beams(group)
            self.groups = [group for group in self.groups if group.unfinished()]
        return saving

    def continue_beams(self, group: SequenceGroup) -> None:
        beams = group.unfinished()
        children = heapq.nlargest(
            self.width,
            ((score, s.seq_id) for s in beams for score in self.candidates(self.scores[s.seq_id])),
        )
        chosen: list[tuple[int, float]] = []
        parents = {parent for _, parent in children}
        for sequence in beams:
            if sequence.seq_id not in parents:
                self.scheduler.finish(sequence.seq_id, "stop")
        for score, parent in children:
            if parent in parents:
                parents.remove(parent)
                chosen.append((parent, score))
            else:
                child = self.scheduler.fork(parent, next(self.seq_ids), len(group.sequences))
                chosen.append((child.seq_id, score))
        is_last = len(beams[0].token_ids) + 1 == group.max_len
        for seq_id, score in chosen:
            self.scores[seq_id] = score
            self.scheduler.append_token(seq_id, 1)
            if is_last:
                self.scheduler.finish(seq_id, "length")

    def candidates(self, score: float) -> list[float]:
        scores = []
        for _ in range(2 * self.width):
            score -= self.rng.expovariate(1 / self.args.spread)
            scores.append(score)
        return scores


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=20_000)
    parser.add_argument("--max-num-seqs", type=int, default=96)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' lognormal distributions")
    parser.add_argument("--spread", type=float, default=1.0, help="of a beam's scores")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    table = Table(
        "workload", "way", "width", "blocks saved", "in the paper", "slots unused", title="Blocks saved by sharing"
    )
    for name, workload in WORKLOADS.items():
        for way, is_beam, reported in (("samples", False, workload.samples), ("beams", True, workload.beams)):
            for width, percent in zip(WIDTHS, reported, strict=True):
                saving = Run(workload, width, is_beam, args).measure()
                table.add_row(
                    name,
                    way,
                    str(width),
                    f"{saving.percent:.1f} %",
                    "" if percent is None else f"{percent} %",
                    f"{saving.unused_slots / (saving.held * args.block_size):.1%}",
                )
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
