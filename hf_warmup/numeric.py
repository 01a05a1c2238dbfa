"""Numbers and words that a caller gives: as Python's own, or refused in a line that names the option and the value.

A sweep hands over numpy's numbers, a configuration Decimals, a training loop tensors. They compare like numbers,
but a checkpoint or a JSON file that holds one cannot be written or read back.
"""

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from torch import Tensor

_LARGEST = 2**63  # what a tensor of steps, and another language's JSON, can count to


def shown(value: Any) -> str:
    """The `repr` of a value in a line, cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # Python refuses to write an integer of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def number(name: str, value: Any) -> float:
    """A number of Python, numpy, `decimal` or `fractions`, or a tensor of one, as a float, also infinite or NaN."""
    given = _item(value)
    if isinstance(given, bool) or not isinstance(given, Real | Decimal):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(given)
    except (OverflowError, ValueError):
        raise ValueError(f"{name} must be a number that a float can hold, got {shown(value)}") from None


def positive(name: str, value: Any) -> float:
    """A number as of `number`, above 0 and finite."""
    if not 0 < (given := number(name, value)) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {given}")
    return given


def not_negative(name: str, value: Any) -> float:
    """A number as of `number`, at least 0 and finite."""
    if not 0 <= (given := number(name, value)) < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {given}")
    return given


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number as an int, below 2^63 in magnitude."""
    given = _item(value)
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    count = int(given)
    if abs(count) >= _LARGEST:
        raise ValueError(f"{name} must be below 2^63, got {shown(value)}")
    if least is not None and count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def boolean(name: str, value: Any) -> bool:
    """True or False as Python's; nothing that is only as good as them."""
    given = _item(value)
    if not isinstance(given, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return given


def _item(value: Any) -> Any:
    """What a scalar of torch or numpy holds."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and not value.is_meta else value
    # numpy's scalars, by what they are, as numpy need not be there. Its arrays are refused, even of one number.
    is_scalar = type(value).__module__ == "numpy" and not hasattr(value, "__array_finalize__")
    return value.item() if is_scalar and hasattr(value, "item") else value
