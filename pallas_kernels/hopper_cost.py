"""What one round of a kernel's inner loop costs a Hopper multiprocessor, counted from its machine code.

A multiprocessor has four quarters, and a warpgroup one warp in each, so an instruction of the loop costs each quarter
the same. Rates are those of the CUDA C++ Programming Guide ("Throughput of Native Arithmetic Instructions", compute
capability 9.0), and of the tensor cores 4,096 dense FLOP a cycle, which at 132 multiprocessors and 1.83 GHz are the data
sheet's 989 TFLOP/s.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .sass import Instruction

TENSOR_FLOP = 4096  # a cycle and multiprocessor
# Cycles that a warp's instruction keeps a quarter's unit busy: 32 threads by results a cycle and quarter.
SPECIAL = {"MUFU": 8}
FMA = dict.fromkeys(("FFMA", "FMUL", "FADD"), 1) | {"IMAD": 2, "HFMA2": 1, "HADD2": 1, "HMUL2": 1}
ALU = dict.fromkeys(
    ("FMNMX", "FSEL", "FSETP", "F2FP", "ISETP", "IADD3", "IABS", "IMNMX", "LEA", "LOP3", "PLOP3", "PRMT", "SEL", "SHF"),
    2,
)


@dataclass(frozen=True)
class RoundCost:
    """Cycles a round of one warpgroup; `others` are the tensor cores' competitors, and `counts` the instructions.

    issue: every instruction takes a slot. special: exponentials and reciprocals. fma: float32 arithmetic. alu: maxima,
    comparisons, selections, conversions, integers.
    """

    tensor: float
    issue: int
    special: int
    fma: int
    alu: int
    counts: Counter[str]

    @property
    def others(self) -> int:
        """Cycles of the busiest unit besides the tensor cores."""
        return max(self.issue, self.special, self.fma, self.alu)

    def bound(self, warpgroups: int) -> float:
        """The share of the tensor cores' rate that so many computing warpgroups can reach at most.

        No unit does more than it can; and if a warpgroup never computes under its own matmuls, its rounds take the sum
        of both, under which only the others' can hide.
        """
        together = self.tensor / max(self.tensor, self.others)
        in_turns = warpgroups * self.tensor / (self.tensor + self.others)
        return min(together, in_turns)


def round_cost(instructions: Iterable[Instruction]) -> RoundCost:
    """The cost of these instructions, as `Loop.shortest` and `Loop.longest` give them."""
    tensor, special, fma, alu = 0.0, 0, 0, 0
    counts: Counter[str] = Counter()
    for instruction in instructions:
        counts[instruction.base] += 1
        special += SPECIAL.get(instruction.base, 0)
        fma += FMA.get(instruction.base, 0)
        alu += ALU.get(instruction.base, 0)
        if shape := matmul_shape(instruction):
            m, n, k = shape
            tensor += 2 * m * n * k / TENSOR_FLOP
    return RoundCost(tensor, counts.total(), special, fma, alu, counts)


def matmul_shape(instruction: Instruction) -> tuple[int, int, int] | None:
    """(m, n, k) of a wgmma, None for other instructions."""
    match = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", instruction.opcode)
    return match and (int(match[1]), int(match[2]), int(match[3]))
