"""The host side under random operations, for as long as one likes.

    PYTHONPATH=. python tests/long_run.py --operations 1000000

Half of them are the block manager's state machine. The others are the scheduler's operations, drawn without hypothesis,
which is ten times as fast; a run that fails is told by its seed, and run again with --seed.
"""

import argparse
import random
import time

from block_machine import BlockMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from operation_count import operations
from scheduler_machine import PREFIXES, World

OPERATIONS_A_RUN = 100


def run_blocks(num_operations: int) -> None:
    long = settings(
        max_examples=500,
        stateful_step_count=100,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    begin = time.monotonic()
    while operations.total < num_operations:
        run_state_machine_as_test(BlockMachine, settings=long)
        print(f"blocks: {operations.total} operations in {time.monotonic() - begin:.0f} s", flush=True)


def make_world(rng: random.Random) -> World:
    num_host_blocks = rng.choice([0, 8, 40])
    return World(
        num_blocks=rng.randint(5, 40),
        block_size=rng.choice([1, 2, 3, 4, 8]),
        num_host_blocks=num_host_blocks,
        prefix_caching=rng.random() < 0.5,
        max_num_seqs=rng.randint(2, 8),
        budget=rng.randint(1, 40),
        max_chunk=rng.choice([None, 1, 5]),
        preemption=rng.choice(["auto", "swap", "recompute"] if num_host_blocks else ["auto", "recompute"]),
    )


def add_request(world: World, rng: random.Random) -> None:
    kind, width, max_tokens = (
        rng.choice(["one", "one", "samples", "beams", "prefix"]),
        rng.randint(1, 4),
        rng.randint(1, 24),
    )
    if kind == "prefix":
        max_tokens = 1
    options = {"samples": {"n": width}, "beams": {"beam_width": width}, "prefix": {"keeps_prefix": True}}
    world.add(
        [*rng.choice(PREFIXES), *(rng.randint(1, 39) for _ in range(rng.randint(1, 6)))],
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, rng.randint(0, 3)),
        priority=rng.choice([0, 0, 0, 1, -1]),
        cache_salt=rng.choice([None, None, "a"]),
        needs_prompt_logits=rng.random() < 0.3,
        **options.get(kind, {}),
    )


def finish_one(world: World, rng: random.Random) -> None:
    groups = [group for group in world.live.values() if group.beam_width is None and group.is_forked]
    if groups:
        world.scheduler.finish(rng.choice(rng.choice(groups).unfinished()).seq_id, "abort")
        world.bury()


def operate(world: World, rng: random.Random) -> None:
    """One random operation."""
    prefixes = list(world.scheduler._prefixes)
    kind = rng.choices(
        ["add", "schedule", "update", "abort", "finish", "release", "fail", "lose all"], [20, 45, 25, 3, 3, 1, 1.5, 1]
    )[0]
    if kind == "add" and len(world.live) < 8:
        add_request(world, rng)
    elif kind == "schedule" and len(world.in_flight) < 2:
        world.schedule()
    elif kind == "update" and world.in_flight:
        world.update()
    elif kind == "abort" and world.live:
        world.abort(rng.choice(sorted(world.live)))
    elif kind == "finish":
        finish_one(world, rng)
    elif kind == "release" and prefixes:
        world.scheduler.release_prefix(rng.choice(prefixes))
    elif kind == "fail" and world.in_flight:
        world.fail()
    elif kind == "lose all":
        world.lose_all()
    else:
        return
    operations.count()


def run_scheduler(seed: int) -> World:
    rng = random.Random(seed)
    world = make_world(rng)
    end = operations.total + OPERATIONS_A_RUN
    while operations.total < end:
        operate(world, rng)
        world.check_books()
    world.drain()
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seed", type=int, help="only this one run of the scheduler")
    args = parser.parse_args()
    if args.seed is not None:
        run_scheduler(args.seed)
        return
    begin, first = time.monotonic(), random.getrandbits(32)
    preemptions = swaps = runs = 0
    while operations.total < args.operations // 2:
        try:
            world = run_scheduler(first + runs)
        except BaseException:
            print(f"failed with --seed {first + runs}", flush=True)
            raise
        preemptions += world.scheduler.num_preemptions
        swaps += world.scheduler.num_swapped_out
        runs += 1
        if runs % 500 == 0:
            print(
                f"scheduler: {operations.total} operations, {preemptions} preemptions, {swaps} of them swapped, "
                f"in {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    print(f"scheduler: {operations.total} operations, {preemptions} preemptions, {swaps} swapped: no difference")
    run_blocks(args.operations)
    print(f"{operations.total} operations: no difference")


if __name__ == "__main__":
    main()
