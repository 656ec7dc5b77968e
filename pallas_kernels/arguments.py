"""Checks of the arguments that the operations share; each raises ValueError with what was expected and what came."""

IMPLEMENTATIONS = ("xla", "reference")


def window_sides(function: str, window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`local_window_size` as (left, right)."""
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int) else window
    if len(sides) != 2 or min(sides) < 0:
        raise ValueError(
            f"{function}: local_window_size must be an int or (left, right), neither of them negative, got {window}"
        )
    return sides


def check_soft_cap(function: str, logits_soft_cap: float | None) -> None:
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"{function}: logits_soft_cap must be positive or None, got {logits_soft_cap}")


def check_implementation(function: str, implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"{function}: implementation must be {known} or None, got {implementation!r}")
