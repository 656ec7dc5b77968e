"""Checks of what a caller gives, whose errors name the argument, what was expected and what came."""

from collections.abc import Sequence


def check_int(name: str, value: object, low: int, high: int | None = None, note: str = "") -> None:
    """Raises TypeError unless `value` is an int (a bool is none), ValueError unless it is in [low, high]."""
    expected = f"an int >= {low}" if high is None else f"an int in [{low}, {high}{note}]"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises TypeError unless `value` is an int or a float, ValueError unless it is finite and in [low, high]."""
    expected = f"a number in {'(' if open_low else '['}{low}, {high}{')' if high == float('inf') else ']'}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    # Stated positively: no comparison holds for NaN.
    if not (low <= value <= high) or (open_low and value == low) or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def as_strings(name: str, value: object, *, at_most: int | None = None) -> tuple[str, ...]:
    """One text or a sequence of texts as a tuple. Raises TypeError for another type, ValueError for an empty text."""
    number = "" if at_most is None else f"at most {at_most} of "
    expected = f"{name}: expected a str or a sequence of {number}them, none empty"
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{expected}, got {value!r}")
    if "" in strings or (at_most is not None and len(strings) > at_most):
        raise ValueError(f"{expected}, got {value!r}")
    return tuple(strings)


def as_token_ids(name: str, value: object) -> tuple[int, ...]:
    """A sequence of token ids as a tuple. Raises TypeError for another type, ValueError for a negative one."""
    expected = f"{name}: expected a sequence of ints >= 0"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{expected}, got {value!r}")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        raise TypeError(f"{expected}, got {value!r}")
    if any(token < 0 for token in value):
        raise ValueError(f"{expected}, got {value!r}")
    return tuple(value)
