"""Requests and steps by hand, for tests of the scheduler. Every prompt is 100, 101, … unless it is given."""

from jpaged.block_manager import BlockManager
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Sequence, SequenceGroup

STOP = 0


def make_scheduler(
    num_blocks=100, block_size=4, max_num_seqs=8, budget=64, *, num_host_blocks=0, prefix_caching=False, **options
):
    blocks = BlockManager(num_blocks, block_size, num_host_blocks=num_host_blocks, prefix_caching=prefix_caching)
    return blocks, Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **options)


def make_group(seq_id, prompt, *, n=1, max_tokens=16, min_tokens=0, model_len=10_000, request_id=None, **options):
    """A request whose sequences are numbered from `seq_id` on; a prompt may be given by its length."""
    tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    return SequenceGroup(
        request_id=request_id or f"r{seq_id}",
        sequences=[Sequence(seq_id + index, index, list(tokens)) for index in range(n)],
        params=SamplingParams(n=n, max_tokens=max_tokens, min_tokens=min_tokens),
        stop_token_ids=frozenset({STOP}),
        seed=seq_id,
        max_len=min(len(tokens) + max_tokens, model_len),
        **options,
    )


def add(scheduler, *groups):
    for group in groups:
        scheduler.add(group)


def step(scheduler, token=9):
    """One step in which every sample is `token`."""
    output = scheduler.schedule()
    scheduler.update(output, [token] * len(output.samples))
    return output


def shapes(output):
    return [(s.seq_id, s.start, s.num_tokens) for s in output.sequences]


def until(scheduler, condition, token=9):
    """Steps up to the one after which the condition holds; the last one's output."""
    for _ in range(100):
        output = step(scheduler, token)
        if condition():
            return output
    raise AssertionError("100 steps have passed in vain")


def row_of(sequence) -> int:
    """That of a sequence which runs."""
    assert sequence.row is not None
    return sequence.row
