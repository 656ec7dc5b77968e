"""What one round of a kernel's inner loop costs a Hopper multiprocessor, counted from its machine code.

A multiprocessor has four quarters, and a warpgroup one warp in each, so an instruction of the loop costs each quarter
the same. Rates are those of the CUDA C++ Programming Guide ("Throughput of Native Arithmetic Instructions", compute
capability 9.0); shared memory gives 128 bytes a cycle; and the tensor cores do 4,096 dense FLOP a cycle, which at 132
multiprocessors and 1.83 GHz are the data sheet's 989 TFLOP/s.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .sass import Instruction

TENSOR_FLOP = 4096  # a cycle and multiprocessor
SHARED_BYTES = 128  # likewise
OPERAND_BYTES = 2  # of an element of bfloat16 or float16
# Cycles that a warp's instruction keeps a quarter's unit busy: 32 threads by results a cycle and quarter.
SPECIAL: dict[str, int] = {"MUFU": 8}
FMA: dict[str, int] = {"FFMA": 1, "FMUL": 1, "FADD": 1, "IMAD": 2, "HFMA2": 1, "HADD2": 1, "HMUL2": 1}
ALU: dict[str, int] = dict.fromkeys(
    ("FMNMX", "FSEL", "FSETP", "F2FP", "ISETP", "IADD3", "IABS", "IMNMX", "LEA", "LOP3", "PLOP3", "PRMT", "SEL", "SHF"),
    2,
)

_LEFT_IN_REGISTERS = re.compile(r"R\d+, R\d+, gdesc")  # the accumulator, the left operand, the right one's place


@dataclass(frozen=True)
class RoundCost:
    """Cycles that a round of one warpgroup keeps each unit busy, and how many of each instruction it has.

    shared: memory that wgmma reads its operands from. issue: every instruction takes a slot. special: exponentials and
    reciprocals. fma: float32 arithmetic. alu: maxima, comparisons, selections, conversions, integers.
    """

    tensor: float
    shared: float
    issue: int
    special: int
    fma: int
    alu: int
    counts: Counter[str]

    @property
    def others(self) -> int:
        """Cycles of the busiest unit that does not work for the matmuls."""
        return max(self.issue, self.special, self.fma, self.alu)

    def bound(self, warpgroups: int) -> float:
        """The share of the tensor cores' rate that so many computing warpgroups can reach at most.

        No unit does more than it can; and if a warpgroup never computes under its own matmuls, its rounds take the sum
        of both, under which only the others' can hide.
        """
        matmuls = max(self.tensor, self.shared)
        together = self.tensor / max(matmuls, self.others)
        in_turns = warpgroups * self.tensor / (matmuls + self.others)
        return min(together, in_turns)


def round_cost(instructions: Iterable[Instruction]) -> RoundCost:
    """The cost of these instructions, as `Loop.shortest` and `Loop.longest` give them."""
    tensor, shared, special, fma, alu = 0.0, 0.0, 0, 0, 0
    counts: Counter[str] = Counter()
    for instruction in instructions:
        counts[instruction.base] += 1
        special += SPECIAL.get(instruction.base, 0)
        fma += FMA.get(instruction.base, 0)
        alu += ALU.get(instruction.base, 0)
        if shape := matmul_shape(instruction):
            m, n, k = shape
            tensor += 2 * m * n * k / TENSOR_FLOP
            left = 0 if _LEFT_IN_REGISTERS.match(instruction.operands) else m * k
            shared += (left + n * k) * OPERAND_BYTES / SHARED_BYTES
    return RoundCost(tensor, shared, counts.total(), special, fma, alu, counts)


def matmul_shape(instruction: Instruction) -> tuple[int, int, int] | None:
    """(m, n, k) of a wgmma, None for other instructions."""
    match = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", instruction.opcode)
    return match and (int(match[1]), int(match[2]), int(match[3]))
