"""A stop that was asked for by SIGTERM or SIGINT and is obeyed at the next safe point, or at once where all are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequestedError(Exception):
    """Whoever runs the work asked to stop; what was begun is unfinished."""


class StopFlag:
    """While entered, the first SIGTERM or SIGINT only sets the flag; a second SIGINT interrupts at once.

    The handlers before it come back on exit. Outside the main thread, where Python allows no handlers, it stays
    unset. `elsewhere` is what another rank of the run is taken to have received.
    """

    elsewhere = signal.SIGTERM

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_urgent = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.received is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing can be lost, a stop raises StopRequestedError without waiting for anyone to ask.

        Code that swallows it there only delays it to the end of the block, and C code that makes another error of it
        changes nothing: whatever ends the block after a stop is that stop.
        """
        self._is_urgent = True
        try:
            self._obey()
            yield
        except Exception as error:
            if self.received is None:
                raise
            raise StopRequestedError from error
        finally:
            self._is_urgent = False
        self._obey()

    def _obey(self) -> None:
        if self.received is not None:
            raise StopRequestedError

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # a second one would interrupt the clearing up after the first
        if is_first and self._is_urgent:
            raise StopRequestedError
