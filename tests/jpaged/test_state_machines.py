"""The host side under random operations; `tests/long_run.py` goes on for longer."""

from block_machine import BlockMachine
from hypothesis import settings
from scheduler_machine import SchedulerMachine

SHORT = settings(deadline=None, stateful_step_count=60, max_examples=150)

TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = SHORT
TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = SHORT
