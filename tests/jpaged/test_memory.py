"""How many blocks fit, with what is free made up."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest

from jpaged.memory import num_blocks_that_fit

MIB = 2**20


@dataclass
class Device:
    platform: str
    stats: dict[str, int] | None = None
    id: int = 0

    def memory_stats(self):
        return self.stats


@dataclass
class Weight:
    """As far as an array that tells where it is."""

    on: Device
    others: list[Device] = field(default_factory=list)

    def devices(self):
        return {id(device): device for device in (self.on, *self.others)}.values()


def fit(device, **changes):
    sizes = {"block_bytes": MIB, "wanted": None, "most_useful": 10**9, "memory_utilization": 0.5} | changes
    return num_blocks_that_fit(beside=Weight(device), **sizes)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def free_memory(monkeypatch):
    """Sets how much memory the machine has free, in MiB."""

    def set_free(mib):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=mib * MIB))

    return set_free


def test_cpu_takes_half_of_the_share_of_what_is_free(free_memory):
    free_memory(1000)
    assert fit(Device("cpu")) == 250  # 1000 MiB * 0.5, and half of that
    assert fit(Device("cpu"), memory_utilization=0.8) == 400
    assert fit(Device("cpu"), block_bytes=3 * MIB) == 83  # 500 // 3 = 166 fit


def test_cpu_takes_no_more_than_two_gib(free_memory):
    free_memory(1_000_000)
    assert fit(Device("cpu")) == 2048
    assert fit(Device("cpu"), block_bytes=3 * MIB) == 682


def test_no_more_than_is_of_use(free_memory):
    free_memory(1000)
    assert fit(Device("cpu"), most_useful=7) == 7
    assert fit(Device("gpu", {"bytes_limit": 100 * MIB, "bytes_in_use": 0}), most_useful=7) == 7


def test_a_wanted_number_is_taken_as_it_is(free_memory):
    free_memory(1000)
    assert fit(Device("cpu"), wanted=500) == 500
    assert fit(Device("cpu"), wanted=500, most_useful=7) == 500


def test_wanted_blocks_that_do_not_fit(free_memory):
    free_memory(1000)
    with pytest.raises(ValueError, match=r"^num_blocks: 501 blocks of 1\.0 MiB need 501\.0 MiB, and 500\.0 MiB of "):
        fit(Device("cpu"), wanted=501)
    with pytest.raises(ValueError, match=r"are free for them: 500 blocks fit$"):
        fit(Device("cpu"), wanted=501)


def test_not_even_one_block_fits(free_memory):
    free_memory(1)
    with pytest.raises(ValueError, match=r"^num_blocks: 1 blocks of 1\.0 MiB need .* 0\.5 MiB .*: 0 blocks fit$"):
        fit(Device("cpu"))


def test_one_block_on_a_cpu_with_room_for_just_that(free_memory):
    free_memory(2)
    assert fit(Device("cpu")) == 1


def test_gpu_takes_its_share_less_what_is_in_use():
    device = Device("gpu", {"bytes_limit": 1000 * MIB, "bytes_in_use": 300 * MIB})
    assert fit(device, memory_utilization=0.9) == 600
    with pytest.raises(ValueError, match="600 blocks fit"):
        fit(device, memory_utilization=0.9, wanted=601)


def test_gpu_whose_share_is_used_up():
    device = Device("gpu", {"bytes_limit": 1000 * MIB, "bytes_in_use": 700 * MIB})
    with pytest.raises(ValueError, match="0 blocks fit"):
        fit(device)


def test_a_device_that_does_not_tell_its_memory():
    with pytest.raises(ValueError, match=r"^num_blocks: .*give their number"):
        fit(Device("gpu", None))


def test_sharded_weights_count_the_first_device():
    first, second = (Device("gpu", {"bytes_limit": n * MIB, "bytes_in_use": 0}, id=n) for n in (10, 20))
    for weight in (Weight(first, [second]), Weight(second, [first])):
        arguments = {"block_bytes": MIB, "wanted": None, "most_useful": 999, "memory_utilization": 1.0}
        assert num_blocks_that_fit(beside=weight, **arguments) == 10  # pyright: ignore[reportArgumentType]
