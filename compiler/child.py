"""A process of ours that may hang or die without harm: it is started, listened to and ended."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

POLL_S = 0.2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Child:
    """Runs `serve(connection, *args, parent)` in a process of its own, started as needed."""

    def __init__(self, serve: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._serve = serve
        self._args = args
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """The process's number, None where there is none."""
        return None if self._process is None else self._process.pid

    def send(self, message: object) -> None:
        """Give it something to do. Raises ConnectionError if it has just died."""
        if self._process is not None and not self._process.is_alive():  # somebody ended it
            self.close()
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=self._serve, args=(theirs, *self._args, os.getpid()), daemon=True
            )
            self._process.start()
            theirs.close()
        self._connection.send(message)

    def receive(self, limit_s: float) -> Any:
        """What it says. Raises TimeoutError, and EOFError or ConnectionError if it died.

        Time in which this process was stopped doesn't count.
        """
        connection = self._connection
        if connection is None:  # somebody closed it
            raise EOFError
        waited = 0.0
        while waited < limit_s:
            start = time.monotonic()
            if connection.poll(min(POLL_S, limit_s)):
                return connection.recv()
            waited += min(time.monotonic() - start, 2 * POLL_S)
        raise TimeoutError

    def death(self) -> str:
        """How the process ended: a signal's name or an exit code."""
        process = self._process
        if process is None:  # it was ended by `close`
            return "SIGKILL"
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is not None:
            process.kill()
            process.join()
        if connection is not None:
            connection.close()


def end_with(parent: int) -> None:
    """Let this process die when its parent does, even in the middle of a kernel that hangs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit
