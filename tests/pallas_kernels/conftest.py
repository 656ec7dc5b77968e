"""What the kernels' tests share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def no_annotation_checks() -> Iterator[None]:
    """Lets wrong shapes through to the function's own checks, which is what a user without this suite meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
