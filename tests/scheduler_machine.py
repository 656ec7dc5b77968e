"""Random requests, steps, ends and failures, against loops that know neither blocks nor steps."""

from collections import deque
from itertools import count
from typing import NamedTuple

from host_model import STOP, FakeRunner, StepRun, candidates, checksum, checksum_of, next_token
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operation_count import operations

from jpaged.block_manager import BlockManager
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput
from jpaged.sequence import Sequence, SequenceGroup

PREFIXES = [[], [7, 8, 9], [11] * 9, [*range(1, 22)]]  # prompts start alike, so that there is something to find


def plain_loop(group: SequenceGroup, index: int) -> tuple[list[int], str]:
    """Tokens and reason of a sample alone in the world."""
    tokens = group.sequences[index].token_ids[: group.sequences[index].prompt_len]
    prompt_len, seen = len(tokens), checksum_of(tokens)
    while True:
        tokens.append(next_token(group.seed, index, seen))
        seen = checksum(seen, tokens[-1])
        if tokens[-1] == STOP and len(tokens) - prompt_len > group.min_tokens:
            return tokens, "stop"
        if len(tokens) == group.max_len:
            return tokens, "length"


class Beam(NamedTuple):
    cost: int
    token_ids: tuple[int, ...]


def best_beams(beams: dict[Beam, int], width: int) -> list[tuple[Beam, Beam]]:
    """The next beams, each with its parent, by the checksums of what these beams saw; in a fixed order."""
    children = [
        (Beam(beam.cost + cost, (*beam.token_ids, token_id)), beam)
        for beam, seen in beams.items()
        for cost, token_id in candidates(seen, 2 * width)
    ]
    return sorted(children)[:width]


def plain_beam_search(prompt: list[int], width: int, num_steps: int) -> list[list[int]]:
    """The beams after each step, best first."""
    beams = [Beam(0, tuple(prompt))]
    for _ in range(num_steps):
        beams = [beam for beam, _ in best_beams({beam: checksum_of(beam.token_ids) for beam in beams}, width)]
    return [list(beam.token_ids) for beam in beams]


class World:
    """A scheduler, its runner, and an engine that looks after requests. Steps run as soon as they are scheduled."""

    def __init__(self, *, num_blocks, block_size, num_host_blocks, prefix_caching, max_num_seqs, budget, **options):
        self.blocks = BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, prefix_caching=prefix_caching
        )
        self.scheduler = Scheduler(self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **options)
        self.runner = FakeRunner(num_blocks, block_size, num_host_blocks)
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.ids = count()
        self.num_steps = 0
        self.live: dict[str, SequenceGroup] = {}
        self.over: list[SequenceGroup] = []
        self.costs: dict[int, int] = {}  # of beams, by seq_id
        self.in_flight: deque[tuple[SchedulerOutput, StepRun]] = deque()

    def add(self, prompt, *, n=1, beam_width=None, max_tokens=8, min_tokens=0, **options):
        seq_ids = [next(self.ids) for _ in range(n)]
        group = SequenceGroup(
            request_id=f"r{seq_ids[0]}",
            sequences=[Sequence(seq_id, index, list(prompt)) for index, seq_id in enumerate(seq_ids)],
            params=SamplingParams(n=n, max_tokens=max_tokens, min_tokens=min_tokens),
            stop_token_ids=frozenset({STOP}),
            seed=seq_ids[0],
            max_len=len(prompt) + max_tokens,
            beam_width=beam_width,
            **options,
        )
        self.live[group.request_id] = group
        self.costs[seq_ids[0]] = 0
        self.scheduler.add(group)
        return group

    def schedule(self):
        self.num_steps += 1
        num_preempted = self.scheduler.num_preemptions
        output = self.scheduler.schedule()
        self.check_output(output)
        has_moved_on = output.num_tokens or output.ended or self.scheduler.num_preemptions > num_preempted
        assert has_moved_on or self.in_flight or not self.live
        self.in_flight.append((output, self.runner.execute(output)))

    def update(self):
        output, run = self.in_flight.popleft()
        updated = self.scheduler.update(output, run.token_ids)
        assert len({group.request_id for group in updated}) == len(updated)
        assert {group.request_id for group in updated} <= set(self.live)
        saw = dict(zip(output.samples.seq_ids, run.seen, strict=True))
        for group in updated:
            if group.beam_width is not None and group.unfinished():
                self.continue_beams(group, saw)
        self.bury()

    def continue_beams(self, group, saw):
        """As the engine does it: drop, fork, append."""
        beams = {Beam(self.costs[s.seq_id], tuple(s.token_ids)): s for s in group.unfinished()}
        assert set(saw) >= {s.seq_id for s in beams.values()}  # all at once
        children = best_beams({beam: saw[s.seq_id] for beam, s in beams.items()}, group.beam_width)
        parents = {parent for _, parent in children}
        for beam, sequence in beams.items():
            if beam not in parents:
                self.scheduler.finish(sequence.seq_id, "stop")
        chosen = []
        for child, parent in children:
            if parent in parents:
                parents.remove(parent)
                sequence = beams[parent]
            else:
                sequence = self.scheduler.fork(beams[parent].seq_id, next(self.ids), len(group.sequences))
            chosen.append((sequence, child))
        for sequence, child in chosen:
            self.scheduler.append_token(sequence.seq_id, child.token_ids[-1])
            self.costs[sequence.seq_id] = child.cost
        if len(chosen[0][0].token_ids) == group.max_len:
            for sequence, _ in chosen:
                self.scheduler.finish(sequence.seq_id, "length")

    def abort(self, request_id):
        self.scheduler.abort(request_id)
        self.bury()

    def fail(self):
        """The steps in flight, or those of them that have not run, wrote nothing that counts."""
        in_flight = {seq_id for output, _ in self.in_flight for seq_id in output.sequences.seq_ids}
        expected = {g.request_id for g in self.live.values() for s in g.unfinished() if s.seq_id in in_flight}
        for output, run in self.in_flight:
            for slot in run.slots:
                self.runner.device.tokens[slot] = -1
            self.runner.device.tokens[[dst for _, dst in (*output.copies, *output.swap_in)]] = -1
            self.runner.host.tokens[[dst for _, dst in output.swap_out]] = -1
        failed = self.scheduler.fail("the device is out of memory")
        assert expected <= {group.request_id for group in failed}
        assert all(group.error == "the device is out of memory" for group in failed)
        self.in_flight.clear()
        self.bury()

    def lose_all(self):
        self.in_flight.clear()
        self.scheduler.preempt_all()
        self.runner.device.clear()
        self.runner.host.clear()

    def bury(self):
        self.over += [group for group in self.live.values() if not group.unfinished()]
        self.live = {request_id: group for request_id, group in self.live.items() if group.unfinished()}

    def check_output(self, output):
        for request_id in output.ended:
            group = self.live[request_id]
            assert group.error
            assert self.never_fits(group)
        self.bury()
        assert output.num_tokens == output.sequences.lengths.sum() <= self.budget
        lengths = output.sequences.lengths.tolist()
        assert lengths == sorted(lengths, key=lambda length: length > 1)
        assert all(s.token_ids is None for s in output.sequences[: output.sequences.num_sampled])
        assert len(set(output.sequences.rows.tolist())) == len(lengths)
        for name in ("sequences", "samples"):
            column = getattr(output, name)
            assert {type(field) for item in column for field in item} <= {int, tuple, type(None)}

    def never_fits(self, group):
        """Alone it would not, or what is kept of prefixes leaves it no room."""
        sequences = [s for s in group.sequences if s.finish_reason == "error"]
        size = self.blocks.block_size
        most = sum(-(-(len(s.token_ids) + 1) // size) + 1 for s in sequences)
        kept = sum(len(self.blocks.block_table(s.seq_id)) for s in self.scheduler._prefixes.values())
        if (group.beam_width or 0) > self.budget:
            return True
        return max(len(sequences), group.beam_width or 0) > self.max_num_seqs or most > self.blocks.num_blocks - kept

    def check_books(self):
        """Rows and blocks: each in one place, and as many as there are."""
        scheduler, blocks = self.scheduler, self.blocks
        running = [s for group in scheduler._running for s in group.unfinished() if s.row is not None]
        leaving = [s for flight in scheduler._in_flight for _, s in flight.ended]
        spare = [row for group in scheduler._running for row in group.spare_rows]
        rows = [s.row for s in (*running, *leaving) if s.row is not None] + spare + scheduler._free_rows
        assert sorted(rows) == list(range(self.max_num_seqs))
        holders = [*running, *leaving, *scheduler._prefixes.values()]
        holders += [s for group in scheduler._beams for s in group.unfinished() if s.row is None]
        held: dict[int, int] = {}
        for sequence in {s.seq_id: s for s in holders}.values():
            for block in blocks.block_table(sequence.seq_id):
                held[block] = held.get(block, 0) + 1
        assert all(blocks.ref_count(block) == held.get(block, 0) for block in range(blocks.num_blocks))
        assert blocks.num_free_blocks == blocks.num_blocks - len(held)
        on_host = {
            block
            for group in scheduler._preempted
            if group.is_swapped
            for s in group.unfinished()
            if s.num_slots
            for block in blocks.block_table(s.seq_id)
        }
        assert blocks.num_free_host_blocks == blocks.num_host_blocks - len(on_host)
        orders = [[g.order for g in queue] for queue in (scheduler._running, scheduler._preempted, scheduler._waiting)]
        assert orders == [sorted(order) for order in orders]

    def drain(self):
        while self.in_flight:
            self.update()
        steps = 0
        while self.live:
            self.schedule()
            self.update()
            steps += 1
            assert steps < 5000, "requests wait for ever"
        self.check_books()
        assert not self.scheduler.has_unfinished()
        for request_id in list(self.scheduler._prefixes):
            self.scheduler.release_prefix(request_id)
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        assert self.blocks.num_free_host_blocks == self.blocks.num_host_blocks
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert sorted(self.scheduler._free_rows) == list(range(self.max_num_seqs))
        for group in self.over:
            self.check_answer(group)

    def check_answer(self, group):
        if group.beam_width is not None:
            last = [s for s in group.sequences if s.finish_reason == "length"]
            if last:
                prompt = last[0].token_ids[: last[0].prompt_len]
                expected = plain_beam_search(prompt, group.beam_width, group.max_len - len(prompt))
                assert sorted(s.token_ids for s in last) == sorted(expected)
            return
        for sequence in group.sequences:
            tokens, reason = plain_loop(group, sequence.index)
            if sequence.finish_reason in ("stop", "length"):
                assert (sequence.token_ids, sequence.finish_reason) == (tokens, reason)
            else:
                assert sequence.token_ids == tokens[: len(sequence.token_ids)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(5, 40),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_host_blocks=st.sampled_from([0, 8, 40]),
        prefix_caching=st.booleans(),
        max_num_seqs=st.integers(2, 8),
        budget=st.integers(1, 40),
        max_chunk=st.sampled_from([None, 1, 5]),
        preemption=st.sampled_from(["auto", "swap", "recompute"]),
    )
    def start(self, num_host_blocks, preemption, **sizes):
        if preemption == "swap" and num_host_blocks == 0:
            num_host_blocks = 8
        self.world = World(num_host_blocks=num_host_blocks, preemption=preemption, **sizes)

    @precondition(lambda self: len(self.world.live) < 8)
    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(1, 39), min_size=1, max_size=6),
        kind=st.sampled_from(["one", "one", "samples", "beams", "prefix"]),
        width=st.integers(1, 4),
        max_tokens=st.integers(1, 24),
        min_tokens=st.integers(0, 3),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([None, None, "a"]),
        all_logits=st.booleans(),
    )
    def add(self, prefix, rest, kind, width, max_tokens, min_tokens, priority, salt, all_logits):
        operations.count()
        options = {"samples": {"n": width}, "beams": {"beam_width": width}, "prefix": {"keeps_prefix": True}}
        self.world.add(
            [*prefix, *rest],
            max_tokens=1 if kind == "prefix" else max_tokens,
            min_tokens=min(min_tokens, 1 if kind == "prefix" else max_tokens),
            priority=priority,
            cache_salt=salt,
            needs_prompt_logits=all_logits,
            **options.get(kind, {}),
        )

    @precondition(lambda self: len(self.world.in_flight) < 2)
    @rule(times=st.integers(1, 4))
    def schedule(self, times):
        for _ in range(times):
            operations.count()
            if len(self.world.in_flight) == 2:
                self.world.update()
            self.world.schedule()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def update(self):
        operations.count()
        self.world.update()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def abort(self, data):
        operations.count()
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.live))))

    @precondition(lambda self: any(g.beam_width is None and g.is_forked for g in self.world.live.values()))
    @rule(data=st.data())
    def finish(self, data):
        operations.count()
        groups = [g for g in self.world.live.values() if g.beam_width is None and g.is_forked]
        sequence = data.draw(st.sampled_from([s for g in groups for s in g.unfinished()]))
        self.world.scheduler.finish(sequence.seq_id, "abort")
        self.world.bury()

    @precondition(lambda self: self.world.scheduler._prefixes)
    @rule()
    def release_prefix(self):
        operations.count()
        self.world.scheduler.release_prefix(next(iter(self.world.scheduler._prefixes)))

    @precondition(lambda self: self.world.in_flight)
    @rule(really=st.sampled_from([False, False, True]))
    def fail(self, really):
        operations.count()
        if really:
            self.world.fail()

    @rule(really=st.sampled_from([False, False, False, True]))
    def lose_all(self, really):
        operations.count()
        if really:
            self.world.lose_all()

    @invariant()
    def books(self):
        if hasattr(self, "world"):
            self.world.check_books()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()
