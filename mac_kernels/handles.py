"""Numbers for objects, since an operator of PyTorch takes tensors, numbers and strings only."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

_numbers = itertools.count()
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(thing: Any) -> int:
    """Give an object a number for as long as it lives."""
    number = next(_numbers)
    _objects[number] = thing
    return number


def registered(number: int) -> Any:
    """The object of a number.

    Raises
    ------
    KeyError
        If it does not live any more.
    """
    return _objects[number]
