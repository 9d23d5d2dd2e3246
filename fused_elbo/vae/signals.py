"""What the operating system asks of a training: Ctrl-C, and the end that schedulers bring with TERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def answered(numbers: Sequence[int], do: Callable[[], object]) -> Iterator[None]:
    """Inside, each of the signals calls ``do`` in place of what it did; in the main thread alone, which gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda *_: do()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
