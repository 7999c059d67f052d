"""Numbers that users give: what counts as an integer, and what else is said."""

from __future__ import annotations

import operator
from typing import Any


def integer(name: str, given: Any) -> int:
    """``given`` as a plain int, which JSON takes.

    Raises:
        TypeError: it is none, or a bool.
    """
    try:
        if isinstance(given, bool):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise TypeError(f"{name}: only integers are allowed; got {given!r}") from None
