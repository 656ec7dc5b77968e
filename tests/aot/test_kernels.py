"""Every kernel in the list of `jpaged compile`, as machine code for an H100."""

import pytest

from pallas_kernels import aot
from serving.compile import compile_entry
from serving.kernel_list import Entry, kernel_list


@pytest.mark.parametrize("entry", kernel_list(), ids=lambda entry: entry.name)
def test_no_spills_no_notes_and_waits_in_order(entry: Entry):
    result = compile_entry(entry, "h100", aot.mesh("h100"))
    assert result.error is None
    assert result.report is not None
    assert result.report.kernels
    assert result.faults == []
