"""Checks of the arguments that the operations share; each raises ValueError with what was expected and what came."""

IMPLEMENTATIONS = ("mosaic", "xla", "reference")


def window_sides(function: str, window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`local_window_size` as (left, right)."""
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int) else window
    if not (isinstance(sides, tuple | list) and len(sides) == 2 and all(isinstance(x, int) and x >= 0 for x in sides)):
        raise ValueError(
            f"{function}: local_window_size must be an int or (left, right), neither of them negative, got {window}"
        )
    return sides[0], sides[1]


def check_soft_cap(function: str, logits_soft_cap: float | None) -> None:
    if not isinstance(logits_soft_cap, int | float | None):
        raise TypeError(f"{function}: logits_soft_cap must be a Python number, got {type(logits_soft_cap).__name__}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"{function}: logits_soft_cap must be positive or None, got {logits_soft_cap}")


def check_implementation(function: str, implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"{function}: implementation must be {known} or None, got {implementation!r}")
