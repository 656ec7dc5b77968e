"""Which tokens of which sequences the next step computes: first come first served, latest preempted first."""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

import numpy as np

from .block_manager import BlockManager, NoFreeBlocks
from .decode_batch import DecodeBatch, DecodeColumns
from .group_blocks import GroupBlocks, Preemption
from .scheduler_output import SchedulerOutput
from .sequence import FinishReason, Sequence, SequenceGroup
from .step_draft import StepDraft

_ORDER = attrgetter("order")


@dataclass(slots=True, eq=False)
class _InFlight:
    """A step that was scheduled and has not come back."""

    output: SchedulerOutput
    decodes: DecodeColumns  # whose samples come first
    starts: np.ndarray  # the decodes' positions
    sampled: list[Sequence]  # whose samples come after
    moved: list[SequenceGroup]  # whose blocks it copies or swaps
    published: list[tuple[int, bytes]]  # what others find since it was scheduled: see BlockManager.retract
    ended: list[tuple[SequenceGroup, Sequence]] = field(default_factory=list)  # to release when it is back
    is_stale: bool = False  # a sequence has ended since

    def uses(self, group: SequenceGroup, sequence: Sequence) -> bool:
        """Whether the step reads or writes the sequence's row or blocks."""
        seq_id = sequence.seq_id
        return seq_id in self.output.sequences.seq_ids or seq_id in self.output.samples.seq_ids or group in self.moved


class Scheduler:
    """Shares rows, blocks and each step's token budget among requests.

    A request runs as soon as all before it do, and rows and blocks for all of its tokens are free. When blocks run
    out, the request that came last leaves and is the first to come back: see `GroupBlocks`. Nothing new is admitted
    while it waits. In a step decodes come first, then prompts in order of arrival, in chunks.

    Outputs run in the order in which they were scheduled, and go to `update` in that order, those without tokens too.
    `schedule` may run once more before the `update` of the step before; what then is in flight is called so below.
    Where a step fails, `fail` or `preempt_all` takes the place of `update` for all that is in flight. Rows and blocks
    of a sequence that ends are given away once no step in flight uses them; those of one that is preempted at once,
    for the step that takes them runs after those in flight, whose tokens are kept.

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
        max_chunk: prompt tokens of one sequence in one step, at most; None: as many as a step takes.
        preemption: see `GroupBlocks`.
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
        max_chunk: int | None = None,
        preemption: Preemption = "auto",
        watermark: float = 0.01,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, got {max_num_seqs}")
        if max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens: expected at least 1, got {max_num_batched_tokens}")
        if max_chunk is not None and max_chunk < 1:
            raise ValueError(f"max_chunk: expected at least 1, got {max_chunk}")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark: expected a fraction in [0, 1), got {watermark}")
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.num_swapped_out = 0  # of the preempted
        self.num_prompt_tokens = 0  # of all requests admitted, each counted once
        self.num_cached_tokens = 0  # those of them that were found in the cache
        self._blocks = block_manager
        self._block_size = block_manager.block_size
        self._group_blocks = GroupBlocks(block_manager, preemption)
        self._max_chunk = max_chunk or max_num_batched_tokens
        self._watermark_blocks = max(1, int(watermark * block_manager.num_blocks))
        # Each in order of service.
        self._running: list[SequenceGroup] = []
        self._preempted: list[SequenceGroup] = []
        self._waiting: list[SequenceGroup] = []
        # A sequence that runs is in the batch, or its group is in one of these two, or it awaits its last token.
        self._decodes = DecodeBatch(max_num_seqs)
        self._prefilling: list[SequenceGroup] = []  # know tokens that are not computed
        self._beams: list[SequenceGroup] = []  # whose tokens the host chooses, when past that
        self._groups: dict[str, SequenceGroup] = {}
        self._members: dict[int, tuple[SequenceGroup, Sequence]] = {}  # the unfinished, by seq_id
        self._prefixes: dict[str, Sequence] = {}  # whose blocks are kept, by request_id
        self._free_rows = list(range(max_num_seqs))[::-1]
        self._in_flight: deque[_InFlight] = deque()
        self._num_added = 0

    @property
    def num_running(self) -> int:
        """Requests that hold rows."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none, the preempted among them."""
        return len(self._waiting) + len(self._preempted)

    @property
    def num_swapped(self) -> int:
        """Those of the waiting whose blocks are on the host."""
        return sum(group.is_swapped for group in self._preempted)

    @property
    def num_unused_slots(self) -> int:
        """Slots of held blocks whose token is not scheduled yet; those that sequences share are counted for each."""
        size = self._block_size
        others = [s for group in chain(self._prefilling, self._beams) for s in group.unfinished() if not s.is_decoding]
        known = sum(self._blocks.blocks_for(s.num_slots) * size - s.num_computed for s in others)
        return int((-self._decodes.starts % size).sum()) + known

    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return bool(self._groups)

    # Requests come and go.

    def add(self, group: SequenceGroup) -> None:
        """Put a request into the queue. ValueError for an id in use, or nothing to generate."""
        if group.request_id in self._groups or group.request_id in self._prefixes:
            raise ValueError(f"request_id: expected one not in use, got {group.request_id!r}")
        if not group.sequences:
            raise ValueError(f"sequences: expected at least one in request {group.request_id!r}, got none")
        seq_ids = {sequence.seq_id for sequence in group.sequences}
        if len(seq_ids) < len(group.sequences) or not seq_ids.isdisjoint(self._members):
            raise ValueError(f"seq_id: expected ids not in use, got {sorted(seq_ids)}")
        prompt = group.sequences[0].token_ids
        if any(sequence.token_ids != prompt for sequence in group.sequences):
            raise ValueError(f"sequences: expected one prompt for all of request {group.request_id!r}")
        if len(prompt) >= group.max_len:
            raise ValueError(f"max_len: expected more than the {len(prompt)} prompt tokens, got {group.max_len}")
        if group.beam_width is not None and (group.beam_width < 1 or len(group.sequences) > 1):
            raise ValueError(
                f"beam_width: expected at least 1, and one sequence to begin with, got {group.beam_width} "
                f"and {len(group.sequences)}"
            )
        group.order = group.priority, self._num_added
        group.is_forked = len(group.sequences) == 1
        self._num_added += 1
        self._groups[group.request_id] = group
        self._members.update((sequence.seq_id, (group, sequence)) for sequence in group.sequences)
        insort(self._waiting, group, key=_ORDER)

    def abort(self, request_id: str) -> None:
        """End a request, at any moment; what a step under way still brings for it is ignored.

        Does nothing for a request that is not here: it may just have finished.
        """
        if request_id in self._groups:
            self._end_group(self._groups[request_id], "abort")

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """End one sequence, for a reason that token ids do not show.

        KeyError if it is not unfinished; ValueError where it is to compute the prompt that others fork from.
        """
        group, sequence = self._member(seq_id)
        if not group.is_forked:
            raise ValueError(f"seq_id: expected one past its prompt, got {seq_id}, whose prompt is others' too")
        if group in self._prefilling and len(group.unfinished()) > 1:
            self._preempt(group, StepDraft(0), may_swap=False)  # others may wait for blocks that it was to compute
        self._end(group, sequence, reason)

    def release_prefix(self, request_id: str) -> None:
        """Give back the blocks kept of a request with `keeps_prefix`. KeyError where none are."""
        if request_id not in self._prefixes:
            raise KeyError(f"request_id: expected one whose prefix is kept, got {request_id!r}")
        self._blocks.free(self._prefixes.pop(request_id).seq_id)

    # The host chooses tokens: beams.

    def fork(self, parent_id: int, child_id: int, index: int) -> Sequence:
        """A new sequence of the parent's request, with its tokens and blocks; `index` is its place in the request.

        KeyError for a parent that is not unfinished, ValueError where the request is no beam search, has no room for
        another sequence, or awaits a step's samples.
        """
        group, parent = self._member(parent_id)
        if group.beam_width is None:
            raise ValueError(f"parent_id: expected a sequence of a beam search, got {parent_id}")
        if len(group.unfinished()) >= group.beam_width:
            raise ValueError(f"parent_id: expected fewer than beam_width {group.beam_width} sequences unfinished")
        if child_id in self._members:
            raise ValueError(f"child_id: expected an id not in use, got {child_id}")
        if any(parent in flight.sampled for flight in self._in_flight):
            raise ValueError(f"parent_id: expected a sequence that awaits no sample, got {parent_id}")
        child = parent.fork(child_id, index)
        if parent.num_slots:
            self._blocks.fork(parent_id, child_id)
            child.num_computed, child.num_slots = parent.num_computed, parent.num_slots
            child.num_committed = parent.num_committed
        group.sequences.append(child)
        self._members[child_id] = group, child
        return child

    def append_token(self, seq_id: int, token_id: int) -> None:
        """The next token of a beam. KeyError and ValueError as for `fork`."""
        group, sequence = self._member(seq_id)
        if group.beam_width is None:
            raise ValueError(f"seq_id: expected a sequence of a beam search, got {seq_id}")
        if any(sequence in flight.sampled for flight in self._in_flight):
            raise ValueError(f"seq_id: expected a sequence that awaits no sample, got {seq_id}")
        sequence.token_ids.append(token_id)

    # Steps.

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens, and make room for them. ValueError while two steps are in flight."""
        if len(self._in_flight) > 1:
            raise ValueError("schedule: expected at most one step in flight, got 2")
        step = StepDraft(self.max_num_batched_tokens)
        published: list[tuple[int, bytes]] = []
        self._blocks.record_published(published)
        beams, left_out = self._make_room(step)
        columns, starts = self._decodes.advance(step.budget, left_out)
        step.decode(columns, starts)
        if self._schedule_beams(beams, step):
            self._schedule_prefills(step)
            self._admit_waiting(step)
        self._blocks.record_published(None)
        output = step.output()
        self._in_flight.append(_InFlight(output, columns, starts, step.sampled, step.moved, published))
        return output

    def update(self, output: SchedulerOutput, token_ids: Items[int]) -> list[SequenceGroup]:
        """Take in a step's sampled tokens, aligned with `output.samples`, and end the sequences now done.

        Returns the requests that got samples. ValueError for an output whose turn it is not.
        """
        if not self._in_flight or self._in_flight[0].output is not output:
            raise ValueError("output: expected that of the step scheduled first of those in flight, got another")
        if len(token_ids) != len(output.samples):
            raise ValueError(f"token_ids: expected {len(output.samples)}, one a sample, got {len(token_ids)}")
        flight = self._in_flight.popleft()
        for group, sequence in flight.ended:
            self._release(group, sequence)
        updated = self._update_decodes(flight, token_ids)
        for sequence, token_id in zip(flight.sampled, token_ids[len(flight.starts) :], strict=True):
            if sequence.finish_reason is None:
                group, _ = self._members[sequence.seq_id]
                updated.append(group)
                if group.beam_width is None:
                    sequence.token_ids.append(token_id)
                    self._end_if_done(group, sequence)
        return list(dict.fromkeys(updated)) if flight.sampled else updated

    def fail(self, error: str) -> list[SequenceGroup]:
        """A step failed: end all requests of the steps in flight with this error, and return them.

        What those steps were to write is found by nobody. Where the cache is lost, `preempt_all` is due after this.
        """
        groups: dict[str, SequenceGroup] = {}
        for flight in self._in_flight:
            self._blocks.retract(flight.published)
            groups |= {group.request_id: group for group in flight.moved}
            groups |= {group.request_id: group for group, _ in flight.ended}
            for seq_id in (*flight.output.sequences.seq_ids, *flight.output.samples.seq_ids):
                if seq_id in self._members:
                    group, _ = self._members[seq_id]
                    groups[group.request_id] = group
        failed = [group for group in groups.values() if group.request_id in self._groups]
        self._forget_flights()
        for group in failed:
            group.error = error
            self._end_group(group, "error")
        return failed

    def preempt_all(self) -> list[str]:
        """The caches, the host's too, have lost what was written: all is to be computed anew.

        Forgets the steps in flight. Returns the requests whose kept prefixes are lost, and forgotten.
        """
        self._forget_flights()
        for group in self._preempted:
            self._group_blocks.drop(group)
        while self._running:
            self._preempt(self._running[-1], StepDraft(0), may_swap=False)
        lost = list(self._prefixes)
        for request_id in lost:
            self.release_prefix(request_id)
        self._blocks.forget_contents()
        return lost

    # The parts of a step. Room is made for all that run, in order of service, before any token is scheduled, so that
    # whoever is preempted for it has no part in the step yet but copies and table updates, which are withdrawn.

    def _make_room(self, step: StepDraft) -> tuple[list[SequenceGroup], set[int]]:
        """Room for one token more of each that is past its prompt.

        Returns the beam searches that go on in this step, and the ids of decodes that cannot.
        """
        beams = [group for group in self._beams if all(s.num_computed < len(s.token_ids) for s in group.unfinished())]
        due = self._decodes.due()
        if beams:
            due += [(group, s, s.num_computed, -1) for group in beams for s in group.unfinished()]
            due.sort(key=lambda item: item[0].order)
        left_out: set[int] = set()
        for group, sequence, start, place in due:
            if group.is_swapped or not sequence.num_slots or sequence.finish_reason:
                continue  # preempted for one of those before, or ended
            if group.beam_width is not None:
                if start == sequence.num_slots:
                    self._grow(group, sequence, start, 1, step)
            elif start == group.max_len - 1:
                self._decodes.discard(group, sequence)  # its last token is sampled already
            elif self._grow(group, sequence, start, self._block_size - start % self._block_size, step):
                self._decodes.grown(group, sequence, place)
            else:
                left_out.add(sequence.seq_id)
        beams = [
            group
            for group in beams
            if not group.is_swapped and all(s.num_computed < s.num_slots for s in group.unfinished())
        ]
        return [group for group in beams if group.unfinished()], left_out

    def _grow(self, group: SequenceGroup, sequence: Sequence, start: int, n: int, step: StepDraft) -> bool:
        """Room for `n` more tokens from position `start` on; False if there is none, or the group itself had to go."""
        while True:
            try:
                copies = self._blocks.append(sequence.seq_id, n)
            except NoFreeBlocks:
                if any(flight.ended for flight in self._in_flight):
                    return False  # for this step only: their blocks come back
                latest = self._running[-1]
                if len(self._running) == 1:
                    held = self._blocks.num_blocks_of([s.seq_id for s in latest.unfinished() if s.num_slots])
                    self._fail(latest, self._needs(held + 1), step)
                else:
                    self._preempt(latest, step)
                if latest is group:
                    return False
            else:
                sequence.num_slots += n
                if copies:
                    step.copy(group, sequence, copies)
                if sequence.row is not None and (copies or start % self._block_size == 0):
                    first = start // self._block_size
                    step.update_table(sequence, first, self._blocks.block_table(sequence.seq_id, first))
                return True

    def _schedule_beams(self, beams: list[SequenceGroup], step: StepDraft) -> bool:
        """One token of each beam, all of a group's in one step; False where the budget does not suffice."""
        for group in beams:
            unfinished = group.unfinished()
            if len(unfinished) > step.budget:
                return False
            for sequence in unfinished:
                if sequence.row is None:
                    self._occupy_row(group, sequence, step)
                self._compute(sequence, 1, step)
                step.sample(sequence, [sequence])
        return True

    def _schedule_prefills(self, step: StepDraft) -> None:
        for group in list(self._prefilling):
            if not step.budget:
                break
            self._schedule_prefill(group, step)

    def _schedule_prefill(self, group: SequenceGroup, step: StepDraft) -> None:
        """Known tokens of a group's sequences, one after the other: the later may share blocks of the earlier."""
        unfinished = group.unfinished()
        # Of several beams the last tokens are computed together, so that their candidates come together.
        has_computed = False
        held_back = 1 if group.beam_width is not None and len(unfinished) > 1 else 0
        for sequence in unfinished if group.is_forked else unfinished[:1]:
            if sequence.is_decoding:
                continue
            left = len(sequence.token_ids) - held_back - sequence.num_computed
            if left > 0:
                n = min(left, step.budget, self._max_chunk)
                if n:
                    self._compute(sequence, n, step)
                    has_computed = True
                if n < left:
                    return
                if not held_back:
                    self._sample(group, sequence, step)
        self._prefilling.remove(group)
        if group.beam_width is not None:
            insort(self._beams, group, key=_ORDER)
            if not has_computed and held_back:  # as when it was swapped in
                self._schedule_beams([group], step)

    def _sample(self, group: SequenceGroup, sequence: Sequence, step: StepDraft) -> None:
        """The sequence's last known token is in the step: from here on it decodes, and who was to fork from it."""
        if group.beam_width is not None:
            step.sample(sequence, [sequence])
            return
        sequences = [sequence]
        if not group.is_forked:
            sequences = group.unfinished()
            for child in sequences[1:]:
                self._blocks.fork(sequence.seq_id, child.seq_id)
                child.num_computed, child.num_slots = sequence.num_computed, sequence.num_slots
                child.num_committed = sequence.num_committed
                self._occupy_row(group, child, step)
            group.is_forked = True
        step.sample(sequence, sequences)
        for each in sequences:
            if each.num_computed < group.max_len - 1:
                self._decodes.add(group, each)

    def _compute(self, sequence: Sequence, n: int, step: StepDraft) -> None:
        """The next `n` known tokens are in the step."""
        if sequence.packed_ids is None:
            sequence.packed_ids = array("i", sequence.token_ids)
        step.compute(sequence, n)
        self._blocks.commit(sequence.seq_id, sequence.packed_ids[sequence.num_committed : sequence.num_computed])
        sequence.num_committed = sequence.num_computed
        if sequence.num_computed == len(sequence.packed_ids):
            sequence.packed_ids = None

    # A request's comings and goings.

    def _admit_waiting(self, step: StepDraft) -> None:
        for queue in (self._preempted, self._waiting):
            while queue:
                if not step.budget or step.has_preempted or not self._admit(queue, step):
                    return

    def _admit(self, queue: list[SequenceGroup], step: StepDraft) -> bool:
        """Let the head of the queue run, or fail for good; False where it has to wait."""
        group = queue[0]
        if queue is self._preempted and any(
            flight.uses(group, sequence) for flight in self._in_flight for sequence in group.unfinished()
        ):
            return False  # it has just left, and its last step is still to bring a token
        if error := self._never_fits(group):
            self._fail(group, error, step)
            return True
        width = group.beam_width or len(group.unfinished())
        # With nothing running there is nobody to leave blocks to, and a request may fill the pool.
        keep_free = self._watermark_blocks if self._running else 0
        if width > len(self._free_rows) or not self._group_blocks.allocate(group, keep_free, step):
            if self._running or any(flight.ended for flight in self._in_flight):
                return False
            if group.is_swapped:  # room for what it shares alone would do
                self._group_blocks.drop(group)
            else:
                self._fail(group, self._needs(self._group_blocks.num_needed(group)), step)
            return True
        queue.pop(0)
        insort(self._running, group, key=_ORDER)
        group.spare_rows = [self._free_rows.pop() for _ in range(width)][::-1]
        for sequence in group.unfinished():
            if sequence.num_slots:
                self._occupy_row(group, sequence, step)
        if group.num_cached_tokens is None:
            group.num_cached_tokens = group.sequences[0].num_computed
            self.num_cached_tokens += group.num_cached_tokens
            self.num_prompt_tokens += len(group.sequences[0].token_ids)
        insort(self._prefilling, group, key=_ORDER)
        self._schedule_prefill(group, step)
        return True

    def _occupy_row(self, group: SequenceGroup, sequence: Sequence, step: StepDraft) -> None:
        sequence.row = group.spare_rows.pop()
        step.occupy_row(group, sequence)
        step.update_table(sequence, 0, self._blocks.block_table(sequence.seq_id))

    def _preempt(self, group: SequenceGroup, step: StepDraft, *, may_swap: bool = True) -> None:
        """Send a running request back, to be the next to come; what is in flight for it is still taken in."""
        self._running.remove(group)
        for sequence in group.unfinished():
            self._decodes.discard(group, sequence)
            if sequence.row is not None:
                self._free_rows.append(sequence.row)
                sequence.row = None
        self._leave(group)
        if may_swap:
            self._group_blocks.preempt(group, step)
        else:
            self._group_blocks.drop(group)
        insort(self._preempted, group, key=_ORDER)
        step.has_preempted = True
        self.num_preemptions += 1
        self.num_swapped_out += group.is_swapped

    def _leave(self, group: SequenceGroup) -> None:
        for groups in (self._prefilling, self._beams):
            if group in groups:
                groups.remove(group)
        self._free_rows += group.spare_rows
        group.spare_rows = []

    def _end_if_done(self, group: SequenceGroup, sequence: Sequence) -> None:
        num_tokens = len(sequence.token_ids)
        may_stop = num_tokens - sequence.prompt_len > group.min_tokens
        if may_stop and sequence.token_ids[-1] in group.stop_token_ids:
            self._end(group, sequence, "stop")
        elif num_tokens >= group.max_len:
            self._end(group, sequence, "length")

    def _end(self, group: SequenceGroup, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        del self._members[sequence.seq_id]
        self._decodes.discard(group, sequence)
        users = [flight for flight in self._in_flight if flight.uses(group, sequence)]
        for flight in users:
            flight.is_stale = True
        if users and sequence.row is not None:
            users[-1].ended.append((group, sequence))
        else:
            self._release(group, sequence)
        if not group.unfinished():
            self._leave(group)
            for queue in (self._running, self._preempted, self._waiting):
                if group in queue:
                    queue.remove(group)
            del self._groups[group.request_id]

    def _end_group(self, group: SequenceGroup, reason: FinishReason) -> None:
        for sequence in group.unfinished():
            self._end(group, sequence, reason)

    def _release(self, group: SequenceGroup, sequence: Sequence) -> None:
        """Give away what a sequence that has ended holds."""
        if sequence.row is not None:
            is_reserved = group.beam_width is not None and group in self._running
            (group.spare_rows if is_reserved else self._free_rows).append(sequence.row)
            sequence.row = None
        if sequence.num_slots:
            if group.keeps_prefix and sequence.finish_reason in ("stop", "length") and not group.is_swapped:
                self._blocks.reserve(sequence.seq_id)
                self._prefixes[group.request_id] = sequence
            else:
                self._blocks.free(sequence.seq_id)
            sequence.num_slots = 0

    def _never_fits(self, group: SequenceGroup) -> str | None:
        """Why the request can never run, not even alone."""
        width = group.beam_width or len(group.unfinished())
        if width > self.max_num_seqs:
            return f"the request has {width} sequences, more than the {self.max_num_seqs} rows"
        if group.beam_width is not None and width > self.max_num_batched_tokens:
            return f"the request has {width} beams, more than the {self.max_num_batched_tokens} tokens of a step"
        needed = self._group_blocks.num_needed(group)
        return self._needs(needed) if needed > self._blocks.num_blocks else None

    def _needs(self, num_blocks: int) -> str:
        kept = " beside the prefixes that are kept" if self._prefixes else ""
        return (
            f"the request needs {num_blocks} blocks of {self._block_size} tokens, "
            f"more than the pool's {self._blocks.num_blocks}{kept}"
        )

    def _fail(self, group: SequenceGroup, error: str, step: StepDraft) -> None:
        for sequence in group.unfinished():
            step.withdraw(sequence)
        group.error = error
        self._end_group(group, "error")
        step.ended.append(group.request_id)

    # What comes back.

    def _update_decodes(self, flight: _InFlight, token_ids: Items[int]) -> list[SequenceGroup]:
        columns, starts = flight.decodes, flight.starts
        token_ids = token_ids[: len(starts)]
        if flight.is_stale:
            for sequence, token_id in zip(columns.sequences, token_ids, strict=True):
                if sequence.finish_reason is None:
                    sequence.token_ids.append(token_id)
        else:
            for add_token, token_id in zip(columns.add_token, token_ids, strict=True):
                add_token(token_id)
        if self._blocks.prefix_caching:
            full = np.flatnonzero((starts + 1) % self._block_size == 0)
            for i, start in zip(full.tolist(), starts[full].tolist(), strict=True):
                sequence = columns.sequences[i]
                if sequence.num_slots and sequence.finish_reason is None:
                    self._blocks.commit(sequence.seq_id, sequence.token_ids[sequence.num_committed : start + 1])
                    sequence.num_committed = start + 1
        done = np.flatnonzero(starts + 2 >= columns.max_lens).tolist()
        if not columns.stop_token_ids.isdisjoint(token_ids):
            done += [i for i, token_id in enumerate(token_ids) if token_id in columns.stop_token_ids]
        for i in done:
            if columns.sequences[i].finish_reason is None:
                self._end_if_done(columns.groups[i], columns.sequences[i])
        if not flight.is_stale:
            return list(columns.distinct_groups)
        return [group for group in columns.distinct_groups if group.request_id in self._groups]

    def _forget_flights(self) -> None:
        while self._in_flight:
            for group, sequence in self._in_flight.popleft().ended:
                self._release(group, sequence)

    def _member(self, seq_id: int) -> tuple[SequenceGroup, Sequence]:
        if seq_id not in self._members:
            raise KeyError(f"seq_id: expected an unfinished sequence, got {seq_id}")
        return self._members[seq_id]
