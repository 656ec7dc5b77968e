"""The host side under random operations; `tests/long_run.py` goes on for longer."""

from block_machine import BlockMachine
from hypothesis import settings
from long_run import run_scheduler
from scheduler_machine import SchedulerMachine

SHORT = settings(deadline=None, stateful_step_count=60, max_examples=150)

TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = SHORT
TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = SHORT


def test_20_000_random_steps_leave_nothing_allocated():
    """Each run ends with all requests served, and no row or block held: see `World.drain`."""
    num_steps = num_preemptions = num_swapped = seed = 0
    while num_steps < 20_000:
        world = run_scheduler(seed)
        num_steps += world.num_steps
        num_preemptions += world.scheduler.num_preemptions
        num_swapped += world.scheduler.num_swapped_out
        seed += 1
    assert num_preemptions > num_swapped > 10
