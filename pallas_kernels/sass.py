"""A kernel's machine code (SASS, as `nvdisasm` prints it): its instructions, the ways through them and its inner loop.

`findings` tells orders of waits that are wrong, where Pallas' interpreter is blind: there a wgmma has finished when it
was issued, and every write to shared memory can be seen by TMA.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P(?:\d|T))\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*)"
)
_LABEL = re.compile(r"^(\.L\w+|\$?[\w$]+):\s*$")
_TARGET = re.compile(r"`\((\.?[\w$]+)\)")
ARRIVAL = "SYNCS.ARRIVE.TRANS64.A1T0"  # mbarrier.arrive; without A1T0 it announces bytes that TMA will bring
TMA_LOADS = ("UTMALDG", "UBLKCP.S.G")  # of tensors, and of bytes in a row
TMA_STORES = ("UTMASTG", "UTMAREDG", "UBLKCP.G.S")
MOST_PENDING = 64  # more groups than a loop without waits needs to be found out


@dataclass(frozen=True)
class Instruction:
    """address: in bytes. opcode: with its modifiers, such as HGMMA.64x128x16.F32.BF16."""

    address: int
    opcode: str
    operands: str
    predicate: str | None

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    def is_a(self, *names: str) -> bool:
        """Whether the opcode is one of these, but for modifiers that follow."""
        return any(f"{self.opcode}.".startswith(f"{name}.") for name in names)

    @property
    def target(self) -> str | None:
        """The label that it names."""
        match = _TARGET.search(self.operands)
        return match and match[1]

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"/*{self.address:04x}*/ {predicate}{self.opcode} {self.operands}"


@dataclass(frozen=True)
class Block:
    """Instructions that run in a row, and the numbers of the blocks that may come next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Sass:
    """The text of one kernel, from `nvdisasm -c`, with control codes or without."""

    text: str

    @cached_property
    def _labelled(self) -> tuple[list[Instruction], dict[str, int]]:
        """All instructions, and of each label the number of the one that follows it."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in self.text.splitlines():
            if match := _INSTRUCTION.search(line):
                operands = match["operands"].strip().rstrip("};").strip()
                address = int(match["address"], 16)
                instructions.append(Instruction(address, match["opcode"], operands, match["predicate"]))
            elif match := _LABEL.match(line):
                labels[match[1]] = len(instructions)
        if not instructions:
            raise ValueError(f"expected the output of nvdisasm, got {self.text[:80]!r}")
        return instructions, labels

    @property
    def instructions(self) -> list[Instruction]:
        """In the order of their addresses."""
        return self._labelled[0]

    def count(self, *names: str) -> int:
        """How many instructions have one of these opcodes, which may leave out modifiers at the end."""
        return sum(instruction.is_a(*names) for instruction in self.instructions)

    @property
    def registers(self) -> int:
        """One more than the highest register that is named: what a thread of the greediest warpgroup needs."""
        return 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", self.text))

    @property
    def register_limits(self) -> tuple[int, ...]:
        """What the warpgroups set by setmaxnreg, in the order of the code; none where they keep the launch's."""
        limits = (i.operands.split(",")[-1] for i in self.instructions if i.base == "USETMAXREG")
        return tuple(int(limit, 16) for limit in limits)

    @cached_property
    def blocks(self) -> list[Block]:
        """The control-flow graph. Raises ValueError for jumps whose targets are not in the text."""
        instructions, labels = self._labelled
        jumps = {"BRA", "EXIT", "RET", "KILL"}
        starts = {0} | set(labels.values()) | {n + 1 for n, i in enumerate(instructions) if i.base in jumps}
        bounds = [*sorted(starts & set(range(len(instructions)))), len(instructions)]
        number = {start: n for n, start in enumerate(bounds)}
        blocks = []
        for start, stop in pairwise(bounds):
            last = instructions[stop - 1]
            following = [number[stop]] if stop < len(instructions) else []
            if last.base in ("BRX", "JMX", "BRXU"):
                raise ValueError(f"expected jumps to labels only, got {last}")
            if last.base == "BRA":
                if last.target not in labels:
                    raise ValueError(f"expected a jump to a label, got {last}")
                falls_through = last.predicate or ".DIV" in last.opcode or re.match(r"!?U?P\d", last.operands)
                following = [number[labels[last.target]]] + (following if falls_through else [])
            elif last.base in ("EXIT", "RET", "KILL") and last.predicate is None:
                following = []
            blocks.append(Block(tuple(instructions[start:stop]), tuple(dict.fromkeys(following))))
        return blocks

    @cached_property
    def inner_loops(self) -> list["Loop"]:
        """The innermost loops around wgmma, in the order of the code."""
        loops = [loop for loop in self._loops if loop.count("HGMMA")]
        return [loop for loop in loops if not any(other.numbers < loop.numbers for other in loops)]

    @property
    def _loops(self) -> list["Loop"]:
        """The natural loops: of every jump back to a block on the way, the blocks that lead to the jump."""
        came_from: dict[int, list[int]] = {}
        for n, block in enumerate(self.blocks):
            for successor in block.successors:
                came_from.setdefault(successor, []).append(n)
        bodies: dict[int, set[int]] = {}
        for tail, head in self._back_edges():
            body = bodies.setdefault(head, {head})
            waiting = [tail]
            while waiting:
                n = waiting.pop()
                if n not in body:
                    body.add(n)
                    waiting += came_from.get(n, [])
        return [Loop(self, head, frozenset(body)) for head, body in sorted(bodies.items())]

    def _back_edges(self) -> list[tuple[int, int]]:
        """The jumps to a block that is on the way to them, met in a depth-first search."""
        found, seen, way = [], {0}, [(0, iter(self.blocks[0].successors))]
        while way:
            number, successors = way[-1]
            on_the_way = {n for n, _ in way}
            for successor in successors:
                if successor in on_the_way:
                    found.append((number, successor))
                elif successor not in seen:
                    seen.add(successor)
                    way.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                way.pop()
        return found

    def pending_at_arrivals(self) -> list[tuple[Instruction, int]]:
        """Each arrival at a barrier, TMA's aside, and how many groups of wgmma may still be reading shared memory.

        Where a warpgroup frees the slot that it has multiplied from, the slot's groups must have finished. As groups
        finish in order, only those issued after them may be pending.
        """
        return [(at, state.pending) for at, state in self._states() if at.is_a(ARRIVAL)]

    def findings(self, pending: int = 0) -> list[str]:
        """What is wrong with the order of waits, a line each; none where all is right.

        pending: how many groups of wgmma may be unfinished at an arrival, where a kernel keeps some in flight that read
          other slots than the one it frees.
        """
        found = [
            f"{count} wgmma groups unfinished (at most {pending} may be) where shared memory is freed: {at}"
            for at, count in self.pending_at_arrivals()
            if count > pending
        ]
        for at, state in self._states():
            if at.is_a(*TMA_STORES) and state.unfenced:
                found.append(f"no fence between a write to shared memory and its TMA store: {at}")
            if at.base == "EXIT" and state.storing:
                found.append(f"no wait between a TMA store and the end: {at}")
        return found

    def _states(self) -> list[tuple[Instruction, "State"]]:
        """Of each instruction the worst state in which it may begin."""
        entry = {0: State()}
        waiting = [0]
        while waiting:
            number = waiting.pop()
            state = entry[number]
            for instruction in self.blocks[number].instructions:
                state = state.after(instruction)
            for successor in self.blocks[number].successors:
                worst = state.or_worse(entry[successor]) if successor in entry else state
                if worst != entry.get(successor):
                    entry[successor] = worst
                    waiting.append(successor)
        states = []
        for number, state in sorted(entry.items()):
            for instruction in self.blocks[number].instructions:
                states.append((instruction, state))
                state = state.after(instruction)
        return states


@dataclass(frozen=True)
class State:
    """What a warpgroup has begun and not waited for.

    committed: groups of wgmma. open: wgmma since the last group. unfenced: writes to shared memory that TMA may not
    see. storing: TMA stores that still read shared memory.
    """

    committed: int = 0
    open: bool = False
    unfenced: bool = False
    storing: bool = False

    @property
    def pending(self) -> int:
        return self.committed + self.open

    def or_worse(self, other: "State") -> "State":
        return State(
            max(self.committed, other.committed),
            self.open or other.open,
            self.unfenced or other.unfenced,
            self.storing or other.storing,
        )

    def after(self, instruction: Instruction) -> "State":
        operands, certain = instruction.operands, instruction.predicate is None
        if instruction.base == "HGMMA":
            if re.search(r"\bgsb0\b", operands) is None:
                return replace(self, open=True)
            return replace(self, open=False, committed=min(self.committed + 1, MOST_PENDING))
        if instruction.base in ("STS", "STSM"):
            return replace(self, unfenced=True)
        if instruction.is_a(*TMA_STORES):
            return replace(self, storing=True)
        if certain and instruction.is_a("WARPGROUP.DEPBAR"):
            return replace(self, committed=min(self.committed, int(operands.split(",")[-1], 16)))
        if certain and instruction.is_a("FENCE.VIEW.ASYNC"):
            return replace(self, unfenced=False)
        if certain and instruction.base == "DEPBAR" and re.match(r"SB0, 0x0\b", operands):
            return replace(self, storing=False)
        return self


@dataclass(frozen=True)
class Loop:
    """The blocks `numbers` of a kernel, entered at `head`."""

    sass: Sass
    head: int
    numbers: frozenset[int]

    def count(self, *names: str) -> int:
        return sum(i.is_a(*names) for n in self.numbers for i in self.sass.blocks[n].instructions)

    def shortest(self) -> list[Instruction]:
        """The instructions of one round, on the shortest of the ways with the most wgmma: a tile without masks."""
        return self._way(-1)

    def longest(self) -> list[Instruction]:
        """The same on the longest of them: a tile with every mask, and each wait having to wait."""
        return self._way(1)

    def _way(self, sign: int) -> list[Instruction]:
        blocks = self.sass.blocks
        best: dict[int, tuple[tuple[int, int], list[int]]] = {}
        on_the_way: set[int] = set()

        def from_block(number: int) -> tuple[tuple[int, int], list[int]] | None:
            """(wgmma, sign * length) and blocks from here to the jump back to the head."""
            if number in best:
                return best[number]
            on_the_way.add(number)
            ends = []
            for successor in blocks[number].successors:
                if successor == self.head:
                    ends.append(((0, 0), []))
                elif successor in self.numbers and successor not in on_the_way:
                    ends.append(from_block(successor))
            on_the_way.remove(number)
            ends = [end for end in ends if end is not None]
            if not ends:
                return None
            (matmuls, length), way = max(ends, key=lambda end: end[0])
            instructions = blocks[number].instructions
            matmuls += sum(i.base == "HGMMA" for i in instructions)
            best[number] = ((matmuls, length + sign * len(instructions)), [number, *way])
            return best[number]

        found = from_block(self.head)
        if found is None:
            raise ValueError(f"expected a loop, got no way back to block {self.head}")
        return [i for number in found[1] for i in blocks[number].instructions]
