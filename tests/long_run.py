"""The state machines of the host side, for as long as one likes.

PYTHONPATH=tests:tests/jpaged python tests/long_run.py --operations 1000000
"""

import argparse
import random
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from operation_count import operations
from test_block_machine import BlockMachine
from test_scheduler_machine import SchedulerMachine


def run(machine: type[RuleBasedStateMachine], num_operations: int) -> None:
    """Random runs until there are so many operations; raises with the smallest failing run."""
    begin, target = time.monotonic(), operations.total + num_operations
    long = settings(
        max_examples=200,
        stateful_step_count=100,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    while operations.total < target:
        run_state_machine_as_test(seed(random.getrandbits(64))(machine), settings=long)
        done = operations.total - target + num_operations
        print(f"{machine.__name__}: {done} operations in {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="in all")
    args = parser.parse_args()
    for machine in (BlockMachine, SchedulerMachine):
        run(machine, args.operations // 2)


if __name__ == "__main__":
    main()
