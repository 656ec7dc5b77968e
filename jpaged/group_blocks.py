"""Blocks for whole requests: all of a request's sequences have theirs on the device, or none has."""

from array import array
from typing import Literal

from .block_manager import BlockManager, NoFreeBlocks
from .sequence import Sequence, SequenceGroup
from .step_draft import StepDraft

Preemption = Literal["auto", "swap", "recompute"]


class GroupBlocks:
    """What a request's coming, leaving and coming back does to blocks.

    A request leaves by swapping, its blocks copied to the host's pool, or by recomputation, its blocks given back
    and all its tokens computed anew as if they were a prompt (arXiv 2309.06180, 4.5). Either way sequences that
    shared blocks share them again: those that are computed anew, the blocks that their tokens have in common.

    Args:
      preemption: "swap" where the host's pool has room and else "recompute"; "auto" swaps only requests of several
        sequences, which recomputation would have to compute one by one.
    """

    def __init__(self, blocks: BlockManager, preemption: Preemption) -> None:
        if preemption not in ("auto", "swap", "recompute"):
            raise ValueError(f"preemption: expected 'auto', 'swap' or 'recompute', got {preemption!r}")
        if preemption == "swap" and not blocks.num_host_blocks:
            raise ValueError("preemption: expected blocks on the host for 'swap', got num_host_blocks=0")
        self._blocks = blocks
        self._preemption = preemption

    def num_needed(self, group: SequenceGroup) -> int:
        """Blocks for all present tokens of all sequences, as if nothing were found cached."""
        unfinished = group.unfinished()
        if len(unfinished) == 1:
            return self._blocks.blocks_for(len(unfinished[0].token_ids))
        if not group.is_forked:
            prompt_len = len(unfinished[0].token_ids)
            copies = (len(unfinished) - 1) * (prompt_len % self._blocks.block_size > 0)
            return self._blocks.blocks_for(prompt_len) + copies
        return sum(
            self._blocks.blocks_for(len(sequence.token_ids)) - shared // self._blocks.block_size
            for sequence, _, shared in self._plan(unfinished)
        )

    def allocate(self, group: SequenceGroup, keep_free: int, step: StepDraft) -> bool:
        """Give all present tokens of all sequences room, and leave `keep_free` blocks free; or else do nothing."""
        if group.is_swapped:
            return self._swap_in(group, keep_free, step)
        unfinished = group.unfinished()
        if group.is_forked and len(unfinished) > 1:
            return self._allocate_all(group, unfinished, keep_free)
        if len(unfinished) > 1:  # room for their copies of the prompt's last block
            keep_free += self.num_needed(group) - self._blocks.blocks_for(len(unfinished[0].token_ids))
        try:
            self._allocate(group, unfinished[0], keep_free)
        except NoFreeBlocks:
            return False
        return True

    def preempt(self, group: SequenceGroup, step: StepDraft) -> None:
        """Take the request's blocks from the device, and what the step would have done to them out of the step."""
        holders = [sequence for sequence in group.unfinished() if sequence.num_slots]
        withdrawn = {dst: src for sequence in holders for dst, src in step.withdraw(sequence).items()}
        seq_ids = [sequence.seq_id for sequence in holders]
        if self._should_swap(holders, seq_ids):
            group.is_swapped = True
            step.swap_out(group, self._blocks.swap_out(seq_ids), withdrawn)
        else:
            self.drop(group)

    def drop(self, group: SequenceGroup) -> None:
        """Give all of the request's blocks back, wherever they are; its tokens are to be computed anew."""
        for sequence in group.unfinished():
            if sequence.num_slots:
                self._blocks.free(sequence.seq_id)
            sequence.num_computed = sequence.num_slots = sequence.num_committed = 0
            sequence.packed_ids = None
        group.is_swapped = False

    def _should_swap(self, holders: list[Sequence], seq_ids: list[int]) -> bool:
        if self._preemption == "recompute" or not any(sequence.num_computed for sequence in holders):
            return False
        if self._preemption == "auto" and len(holders) == 1:
            return False
        return self._blocks.num_blocks_of(seq_ids) <= self._blocks.num_free_host_blocks

    def _swap_in(self, group: SequenceGroup, keep_free: int, step: StepDraft) -> bool:
        holders = [sequence for sequence in group.unfinished() if sequence.num_slots]
        seq_ids = [sequence.seq_id for sequence in holders]
        short = [sequence for sequence in holders if sequence.num_slots < len(sequence.token_ids)]
        if self._blocks.num_blocks_of(seq_ids) + len(short) + keep_free > self._blocks.num_free_blocks:
            return False
        step.swap_in(group, self._blocks.swap_in(seq_ids))
        for sequence in short:  # by the one token that was sampled last
            step.copy(group, sequence, self._blocks.append(sequence.seq_id, 1))
            sequence.num_slots += 1
        group.is_swapped = False
        return True

    def _allocate_all(self, group: SequenceGroup, unfinished: list[Sequence], keep_free: int) -> bool:
        if keep_free and self.num_needed(group) + keep_free > self._blocks.num_free_blocks:
            return False
        try:
            for sequence, sibling, shared in self._plan(unfinished):
                if sibling is None:
                    self._allocate(group, sequence, 0)
                else:
                    self._blocks.fork(sibling.seq_id, sequence.seq_id, length=shared)
                    sequence.num_slots = sequence.num_computed = shared
                    sequence.num_committed = min(sibling.num_committed, shared)
                    self._blocks.append(sequence.seq_id, len(sequence.token_ids) - shared)
                    sequence.num_slots = len(sequence.token_ids)
        except NoFreeBlocks:
            self.drop(group)
            return False
        return True

    def _allocate(self, group: SequenceGroup, sequence: Sequence, keep_free: int) -> None:
        sequence.packed_ids = array("i", sequence.token_ids)
        num_cached = self._blocks.allocate(
            sequence.seq_id,
            sequence.packed_ids,
            salt=group.cache_salt,
            use_cached=not group.needs_prompt_logits,
            keep_free=keep_free,
        )
        sequence.num_computed = sequence.num_committed = num_cached
        sequence.num_slots = len(sequence.token_ids)

    def _plan(self, sequences: list[Sequence]) -> list[tuple[Sequence, Sequence | None, int]]:
        """For each sequence, the one before it with which it shares the most, and the tokens of the blocks shared."""
        plan: list[tuple[Sequence, Sequence | None, int]] = []
        for i, sequence in enumerate(sequences):
            shared, sibling = max(
                ((self._num_shared(sequence.token_ids, sequences[j].token_ids), j) for j in range(i)), default=(0, 0)
            )
            plan.append((sequence, sequences[sibling] if shared else None, shared))
        return plan

    def _num_shared(self, token_ids: list[int], others: list[int]) -> int:
        """Tokens of the full blocks that both have in common; at least one token is left to compute."""
        n = min(len(token_ids) - 1, len(others))
        common = next((i for i, (a, b) in enumerate(zip(token_ids, others, strict=False)) if a != b), n)
        return min(common, n) // self._blocks.block_size * self._blocks.block_size
