"""Values that may be some seconds old, so that fifty voters do not compute them fifty times."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, cast

KEPT = 64  # values

T = TypeVar("T")


class Recent(Generic[T]):
    """The last `KEPT` values asked for, each computed anew when it is older than `seconds`.

    While one thread computes, the others get the old value; no lock is held meanwhile.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[float, T | None]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, computed by `make` where there is none that is recent."""
        now = self._clock()
        with self._lock:
            until, value = self._values.get(key, (now, None))
            if now < until:
                return cast(T, value)
            if value is not None:
                self._values[key] = (now + self._seconds, value)
        made = make()
        with self._lock:
            self._values[key] = (self._clock() + self._seconds, made)
            self._values.move_to_end(key)
            while len(self._values) > KEPT:
                self._values.popitem(last=False)
        return made
