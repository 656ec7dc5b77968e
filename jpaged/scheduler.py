"""Which tokens of which sequences the next step computes: first come first served, latest preempted first."""

from collections import deque
from collections.abc import Sequence as Items
from itertools import chain

from .block_manager import Allocation, BlockManager, NoFreeBlocks
from .scheduler_output import (
    NewRow,
    Sample,
    Samples,
    ScheduledSequence,
    ScheduledSequences,
    SchedulerOutput,
    TableUpdate,
)
from .sequence import FinishReason, Sequence, SequenceGroup


class Scheduler:
    """Shares rows, blocks and each step's token budget among requests.

    A request runs as soon as all before it do, and rows and blocks for all of its tokens are free. When
    blocks run out, the request that came last gives all of its own back, and later computes its tokens anew.

    Outputs run in the order in which they were scheduled, and go to `update` in that order, those without tokens too.
    `schedule` may run once more before the `update` of the step before; what then is in flight is called so below.
    Where a step fails, `fail` and `preempt_all` take the place of `update` for all that is in flight.

    Parallel sampling: `samples` names, at the prompt's last token, all n sequences, each with a row of its own; the
    rows of the others come in the same output's `new_rows`, their tables share the prompt's blocks, and from the next
    step on each decodes, with `copies` where they part.

    Beam search (`SequenceGroup.beam_width`): each unfinished sequence gets its one sample a step, which says where
    candidates are to be taken; the token id given to `update` for it is not used. After `update` the engine calls, in
    this order, `finish` for the beams that nobody continues, `fork(parent_id, child_id, index)` for every further
    child of a beam (its first child goes on under the parent's own id) and `append_token(seq_id, token_id)` for every
    beam. Until all unfinished beams have their token the request sits out. There may be `beam_width` unfinished at
    once. `max_len` and stop tokens are the engine's to look after. All of this also works for a request that has been
    preempted meanwhile: no blocks need to be held.

    Prompt logprobs: with `SequenceGroup.needs_prompt_logits` no prompt token is skipped, so that each passes through
    `sequences` (of a preempted request again: those already known are to be ignored).

    Args:
        block_manager: the pool; sequences hold blocks exactly while they hold a row.
        max_num_seqs: rows, hence sequences that can run at once.
        max_num_batched_tokens: tokens of one step, at most.
        watermark: share of the blocks that admission leaves free (at least one) for the running to grow into.

    Example:
        >>> scheduler = Scheduler(BlockManager(8, 4), max_num_seqs=2, max_num_batched_tokens=16)
        >>> sequence = Sequence(seq_id=0, index=0, token_ids=[5, 6, 7])
        >>> from jpaged.sampling_params import SamplingParams
        >>> params = SamplingParams(max_tokens=16)
        >>> scheduler.add(SequenceGroup("a", [sequence], params, frozenset({2}), seed=0, max_len=19))
        >>> output = scheduler.schedule()
        >>> output.sequences[0]
        ScheduledSequence(seq_id=0, row=0, start=0, num_tokens=3, token_ids=(5, 6, 7))
        >>> groups = scheduler.update(output, [9])
        >>> sequence.token_ids
        [5, 6, 7, 9]
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        watermark: float = 0.01,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, got {max_num_seqs}")
        if max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens: expected at least 1, got {max_num_batched_tokens}")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark: expected a fraction in [0, 1), got {watermark}")
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self._blocks = block_manager
        self._watermark_blocks = max(1, int(watermark * block_manager.num_blocks))
        # Running, then waiting, is the order of arrival: the preempted go from the end of the one to the head
        # of the other, and the head is never overtaken, so nothing new is admitted while a preempted one waits.
        self._running: list[SequenceGroup] = []
        self._waiting: deque[SequenceGroup] = deque()
        self._groups: dict[str, SequenceGroup] = {}
        self._members: dict[int, tuple[SequenceGroup, Sequence]] = {}  # the unfinished, by seq_id
        self._free_rows = list(range(max_num_seqs))[::-1]

    @property
    def num_running(self) -> int:
        """Requests that hold rows."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none, the preempted among them."""
        return len(self._waiting)

    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return bool(self._groups)

    def add(self, group: SequenceGroup) -> None:
        """Put a request at the end of the queue. ValueError for an id in use, or nothing to generate."""
        if group.request_id in self._groups:
            raise ValueError(f"request_id: expected one not in use, got {group.request_id!r}")
        if not group.sequences:
            raise ValueError(f"sequences: expected at least one in request {group.request_id!r}, got none")
        seq_ids = {sequence.seq_id for sequence in group.sequences}
        if len(seq_ids) < len(group.sequences) or not seq_ids.isdisjoint(self._members):
            raise ValueError(f"seq_id: expected ids not in use, got {sorted(seq_ids)}")
        longest = max(sequence.prompt_len for sequence in group.sequences)
        if longest >= group.max_len:
            raise ValueError(f"max_len: expected more than the {longest} prompt tokens, got {group.max_len}")
        self._groups[group.request_id] = group
        self._members.update((sequence.seq_id, (group, sequence)) for sequence in group.sequences)
        self._waiting.append(group)

    def abort(self, request_id: str) -> None:
        """End a request, at any moment; what a step under way still brings for it is ignored.

        Does nothing for a request that is not here: it may just have finished.
        """
        if request_id in self._groups:
            self._end_group(self._groups[request_id], "abort")

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """End one sequence, for a reason that token ids do not show. KeyError if it is not unfinished."""
        if seq_id not in self._members:
            raise KeyError(f"seq_id: expected an unfinished sequence, got {seq_id}")
        self._end(*self._members[seq_id], reason)

    def preempt_all(self) -> None:
        """Send all running requests back to the queue, to be computed anew: the cache has lost what they wrote."""
        while self._running:
            self._preempt()

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens, and make room for them."""
        step = _Step(self.max_num_batched_tokens)
        self._schedule_decodes(step)
        self._schedule_prefills(step)
        self._admit_waiting(step)
        return step.output()

    def update(self, output: SchedulerOutput, token_ids: Items[int]) -> list[SequenceGroup]:
        """Take in a step's sampled tokens, aligned with `output.samples`, and end the sequences now done.

        Returns the requests that got tokens, in order of the samples.
        """
        if len(token_ids) != len(output.samples):
            raise ValueError(f"token_ids: expected {len(output.samples)}, one a sample, got {len(token_ids)}")
        for seq_id, _, start, num_tokens, _ in output.sequences:
            if seq_id in self._members:
                _, sequence = self._members[seq_id]
                self._blocks.commit(seq_id, sequence.token_ids[start : start + num_tokens])
        updated: dict[str, SequenceGroup] = {}
        for sample, token_id in zip(output.samples, token_ids, strict=True):
            if sample.seq_id in self._members:
                group, sequence = self._members[sample.seq_id]
                sequence.token_ids.append(token_id)
                updated[group.request_id] = group
                if reason := _reason_to_end(group, sequence):
                    self._end(group, sequence, reason)
        return list(updated.values())

    # The parts of a step. Groups are scheduled in order of arrival and preempted from the other end, so none
    # loses its blocks after its tokens have gone into the step: there is never anything to withdraw.

    def _schedule_decodes(self, step: "_Step") -> None:
        # The budget suffices: each of these sequences had a token, at least, in the step before.
        index = 0
        while index < len(self._running):  # which preemption shortens
            group = self._running[index]
            decodes = [s for s in group.sequences if s.finish_reason is None and s.num_computed >= s.prefill_len]
            if self._make_room(group, decodes, step):
                for sequence in decodes:
                    self._schedule_decode(sequence, step)
            index += 1

    def _schedule_decode(self, sequence: Sequence, step: "_Step") -> None:
        first, offset = divmod(sequence.num_computed, self._blocks.block_size)
        if offset == 0:  # this token opens a block
            step.update_table(sequence, first, self._blocks.block_table(sequence.seq_id)[first:])
        step.compute(sequence, 1)

    def _schedule_prefills(self, step: "_Step") -> None:
        # Only the latest can be amid its prefill: while budget lacks for that, nothing is admitted after it.
        if self._running:
            self._schedule_prefill(self._running[-1], step)

    def _schedule_prefill(self, group: SequenceGroup, step: "_Step") -> None:
        for sequence in group.sequences:
            if step.budget and sequence.finish_reason is None and sequence.num_computed < sequence.prefill_len:
                step.compute(sequence, min(sequence.prefill_len - sequence.num_computed, step.budget))

    def _admit_waiting(self, step: "_Step") -> None:
        while self._waiting and step.budget:
            group = self._waiting[0]
            sequences = group.unfinished()
            room = self._room_for(sequences)
            if room is Allocation.NEVER:
                self._fail(group, step)
            elif room is Allocation.LATER:
                break
            else:
                self._admit(group, sequences, step)
                self._schedule_prefill(group, step)

    def _room_for(self, sequences: list[Sequence]) -> Allocation:
        """Whether there are rows, and blocks for all present tokens, of all the sequences of one request."""
        if len(sequences) > self.max_num_seqs:
            return Allocation.NEVER
        # With nothing running there is nobody to leave blocks to, and a request may fill the pool.
        keep_free = self._watermark_blocks if self._running else 0
        room = self._blocks.can_allocate(*(s.token_ids for s in sequences), keep_free=keep_free)
        if room is Allocation.OK and len(sequences) > len(self._free_rows):
            return Allocation.LATER
        return room

    def _make_room(self, group: SequenceGroup, sequences: list[Sequence], step: "_Step") -> bool:
        """Room for one more token of each of these, of `group`; False if the group itself had to leave."""
        for sequence in sequences:
            while not self._append(sequence):
                latest = self._running[-1]
                if len(self._running) == 1:
                    self._fail(latest, step)
                else:
                    self._preempt()
                if latest is group:
                    return False
        return True

    def _append(self, sequence: Sequence) -> bool:
        try:
            self._blocks.append(sequence.seq_id, 1)
        except NoFreeBlocks:
            return False
        return True

    # A request's comings and goings.

    def _admit(self, group: SequenceGroup, sequences: list[Sequence], step: "_Step") -> None:
        self._waiting.popleft()
        self._running.append(group)
        for sequence in sequences:
            self._blocks.allocate(sequence.seq_id, sequence.token_ids)
            sequence.row = self._free_rows.pop()
            sequence.prefill_len = len(sequence.token_ids)
            step.occupy_row(group, sequence)
            step.update_table(sequence, 0, self._blocks.block_table(sequence.seq_id))

    def _preempt(self) -> None:
        """Send the latest running request back to the head of the queue, to be computed anew."""
        group = self._running.pop()
        for sequence in group.unfinished():
            self._release(sequence)
            sequence.num_computed = 0
        self._waiting.appendleft(group)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._blocks.free(sequence.seq_id)
        self._free_rows.append(sequence.row)
        sequence.row = None

    def _end(self, group: SequenceGroup, sequence: Sequence, reason: FinishReason) -> None:
        queue = self._waiting if sequence.row is None else self._running
        if sequence.row is not None:
            self._release(sequence)
        sequence.finish_reason = reason
        del self._members[sequence.seq_id]
        if not group.unfinished():
            queue.remove(group)
            del self._groups[group.request_id]

    def _end_group(self, group: SequenceGroup, reason: FinishReason) -> None:
        for sequence in group.unfinished():
            self._end(group, sequence, reason)

    def _fail(self, group: SequenceGroup, step: "_Step") -> None:
        sequences = group.unfinished()
        needed = sum(self._blocks.blocks_for(len(sequence.token_ids)) for sequence in sequences)
        if len(sequences) > self.max_num_seqs:
            group.error = f"the request has {len(sequences)} sequences, more than the {self.max_num_seqs} rows"
        else:
            group.error = (
                f"the request needs {needed} blocks of {self._blocks.block_size} tokens, "
                f"more than the pool's {self._blocks.num_blocks}"
            )
        self._end_group(group, "error")
        step.ended.append(group.request_id)


def _reason_to_end(group: SequenceGroup, sequence: Sequence) -> FinishReason | None:
    num_tokens = len(sequence.token_ids)
    may_stop = num_tokens - sequence.prompt_len > group.params.min_tokens
    if may_stop and sequence.token_ids[-1] in group.stop_token_ids:
        return "stop"
    return "length" if num_tokens >= group.max_len else None


class _Step:
    """A SchedulerOutput in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that the step may still take
        self.ended: list[str] = []
        self._single: list[ScheduledSequence] = []
        self._several: list[ScheduledSequence] = []
        self._sampled: set[int] = set()
        self._table_updates: list[TableUpdate] = []
        self._new_rows: list[NewRow] = []

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the sequence's next tokens into the step."""
        assert sequence.row is not None
        start = sequence.num_computed
        end = start + num_tokens
        sampled_here = start >= sequence.prefill_len
        scheduled = ScheduledSequence(
            sequence.seq_id,
            sequence.row,
            start,
            num_tokens,
            None if sampled_here else tuple(sequence.token_ids[start:end]),
        )
        (self._single if num_tokens == 1 else self._several).append(scheduled)
        if end == len(sequence.token_ids):
            self._sampled.add(sequence.seq_id)
        sequence.num_computed = end
        self.budget -= num_tokens

    def occupy_row(self, group: SequenceGroup, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._new_rows.append(
            NewRow(
                sequence.row,
                sequence.seq_id,
                sequence.index,
                sequence.prompt_len,
                group.params,
                group.seed,
                group.stop_token_ids,
                tuple(sequence.token_ids),
                group.bad_words,
            )
        )

    def update_table(self, sequence: Sequence, first: int, block_ids: tuple[int, ...]) -> None:
        assert sequence.row is not None
        self._table_updates.append(TableUpdate(sequence.row, first, block_ids))

    def output(self) -> SchedulerOutput:
        samples: list[Sample] = []
        end = 0
        single = sorted(self._single, key=lambda scheduled: scheduled.token_ids is not None)
        for scheduled in chain(single, self._several):
            end += scheduled.num_tokens
            if scheduled.seq_id in self._sampled:
                samples.append(Sample(scheduled.seq_id, scheduled.row, end - 1))
        return SchedulerOutput(
            new_rows=tuple(self._new_rows),
            table_updates=tuple(self._table_updates),
            sequences=ScheduledSequences.of((*single, *self._several)),
            samples=Samples.of(samples),
            ended=tuple(self.ended),
        )
