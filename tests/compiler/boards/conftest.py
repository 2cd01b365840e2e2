"""A real tracker and real servers on the loopback; all of them end with the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from topiarist.compiler.boards.tracker import Tracker
from topiarist.compiler.child import end_with
from topiarist.errors import BoardError

SERVE = "topiarist.compiler.cli"
START_S = 120.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Network:
    """A tracker, and boards by key; each is a process with a group of its own."""

    port: int
    folder: str  # for what killed processes leave behind
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """The tracker's."""
        return "127.0.0.1", self.port

    @property
    def text(self) -> str:
        """The tracker's address for the command line."""
        return f"127.0.0.1:{self.port}"

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        """A Python process that runs a module."""
        return self.run([sys.executable, "-m", *args])

    def run(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A process that ends with the network."""
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "TMPDIR": self.folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(end_with, os.getpid()),
        )
        self.started.append(process)
        return process

    def track(self) -> subprocess.Popen[bytes]:
        """The tracker."""
        port = str(self.port)
        return self.start(SERVE, "board", "tracker", "--host", "127.0.0.1", "--port", port)

    def serve(self, key: str, *more: str) -> subprocess.Popen[bytes]:
        """A board."""
        where = ("--host", "127.0.0.1", "--port", str(self.port + 1), "--port-end", "65535")
        return self.start(
            *(SERVE, "board", "serve", "--tracker", self.text, "--key", key), *where, *more
        )

    def serve_badly(self, fault: str, key: str) -> subprocess.Popen[bytes]:
        """A board with a fault, see `bad_server.py`."""
        return self.start("tests.compiler.boards.bad_server", fault, str(self.port), key)

    def wait_for(self, **boards: int) -> None:
        """Until so many boards of each key are free."""
        self._wait(
            lambda tracker: {k.key: k.free for k in tracker.known_keys()}.items() >= boards.items()
        )

    def wait(self) -> None:
        """Until the tracker answers."""
        self._wait(lambda tracker: True)

    def _wait(self, ready: Callable[[Tracker], bool]) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                with Tracker(self.address) as tracker:
                    if ready(tracker):
                        return
            except BoardError:
                pass
            time.sleep(0.1)
        raise AssertionError("the network doesn't start")

    def close(self) -> None:
        """End everything."""
        for process in self.started:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process and those that it started hang, whoever else continues them."""
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.05):
            os.killpg(process.pid, signal.SIGSTOP)

    os.killpg(process.pid, signal.SIGSTOP)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def network() -> Iterator[Network]:
    """A tracker that runs."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        made = Network(free_port(), folder)
        stack.callback(made.close)
        made.track()
        made.wait()
        yield made


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """A tracker for the tests of a module."""
    with network() as made:
        yield made
