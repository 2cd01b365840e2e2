"""What runs on a board: TVM's RPC server, with functions of ours, in a process that is watched.

TVM's server serves no more when a session's process has crashed, which a wrong kernel does to it.
So the server is a child of ours: it is started anew, on the same port, whenever it ends.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from topiarist.compiler import runtime
from topiarist.compiler.boards.board import MOST_CONSTANTS, PROTOCOL, Board, Cores, flusher
from topiarist.compiler.child import end_with
from topiarist.errors import BoardError, TargetError, TopiaristError
from topiarist.targets import linux
from topiarist.targets.detect import detect, runs_here
from topiarist.targets.spec import TargetSpec

START_S = 120.0  # importing TVM from a slow card
PAUSE_S = 1.0  # before a server that ended is started again
GRACE_S = 1.0  # for a session to end by itself when its client is gone
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """Where to serve: `tracker` knows the board as `key`. The first free port of a range is taken.

    `address` is what the tracker tells others, by default where it sees the board.
    """

    tracker: tuple[str, int]
    key: str
    cores: Cores
    host: str = "0.0.0.0"
    port: int = 9090
    port_end: int = 9199
    address: str | None = None


def serve(options: ServeOptions, say: Say) -> None:
    """Serve until interrupted. Raises BoardError if the server can't be started at all."""
    with _folder() as folder, _terminable():
        while True:
            server = _Server(options, folder)
            try:
                port = server.start()
                if port != options.port:
                    options = replace(options, port=port)
                say(f"serving on port {port} as {options.key!r}; Ctrl-C ends it")
                how = server.wait()
            finally:
                server.close()
            say(f"the server ended ({how}), which is what a wrong kernel does to it; starting anew")
            time.sleep(PAUSE_S)
            _empty(folder)


class _Server:
    """The process with TVM's server."""

    def __init__(self, options: ServeOptions, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, self.theirs = context.Pipe()
        self.process = context.Process(
            target=run_server, args=(self.theirs, options, str(folder), os.getpid())
        )

    def start(self) -> int:
        """The port. Raises BoardError."""
        self.process.start()
        self.theirs.close()
        try:
            reply = self.connection.recv() if self.connection.poll(START_S) else "it doesn't start"
        except EOFError:
            reply = "it ended at once"
        if isinstance(reply, str):
            raise BoardError(f"TVM's RPC server can't be started: {reply}")
        return int(reply)

    def wait(self) -> str:
        """How it ended."""
        self.process.join()
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End it, with the sessions that it has."""
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.connection.close()


def run_server(connection: Connection, options: ServeOptions, folder: str, parent: int) -> None:
    """The process: TVM's server until its thread ends. It sends its port, or what is wrong."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    tempfile.tempdir = folder  # TVM leaves its folders behind when a session crashes
    try:
        state = _start(options)
    except (OSError, ValueError, RuntimeError, TopiaristError) as error:
        connection.send(str(error) or type(error).__name__)
        return
    connection.send(state.port)
    state.thread.join()


def _start(options: ServeOptions) -> Any:
    """TVM's server, in a thread of its own; sessions are forks of this process."""
    os.sched_setaffinity(0, options.cores.numbers)
    # Kernels need TVM's runtime only, and small boards have no memory for its compiler.
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    runtime.load()
    import tvm.rpc.server

    multiprocessing.set_start_method("fork", force=True)  # or sessions lack our functions
    _register(options.cores)
    tvm.rpc.server._serve_loop = _watched(tvm.rpc.server._serve_loop, os.getpid())
    state = tvm.rpc.server.PopenRPCServerState(
        *(options.host, options.port, options.port_end),
        tracker_addr=options.tracker,
        key=options.key,
        custom_addr=options.address,
    )
    state.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:  # a desk that is switched off must not keep the board
        state.sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return state


def _watched(serve_loop: Callable[..., None], server: int) -> Callable[..., None]:
    """TVM's loop of a session, which ends with its client even if a kernel hangs."""

    def loop(sock: socket.socket, *args: Any) -> None:
        end_with(server)
        threading.Thread(target=_end_when_closed, args=(sock.fileno(),), daemon=True).start()
        with contextlib.suppress(RuntimeError):  # a client that was killed resets the connection
            serve_loop(sock, *args)

    return loop


def _end_when_closed(connection: int) -> None:
    """Wait until the client is gone, and a little; then end this process."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    poll.poll()
    time.sleep(GRACE_S)
    os._exit(0)  # TVM's server takes it for a session that ended well


def _register(cores: Cores) -> None:
    """Functions for sessions, beside TVM's own; `session.py` calls them."""
    ffi = runtime.load()

    def describe() -> str:
        return describe_board(cores).to_text()

    def refuses(target: str) -> str:
        return refusal(target)

    def set_threads(threads: int) -> int:
        runtime.ThreadPool(int(threads)).call(lambda: None)
        return int(ffi.get_global_func("runtime.NumThreads")())

    def stored(name: str) -> str:
        path = Path.cwd() / name  # sessions run in their folder
        size = path.stat().st_size if path.exists() else 0
        return json.dumps([size, shutil.disk_usage(Path.cwd()).free])

    def time_calls(module: Any, text: str, *tensors: Any) -> bytes:
        return timed_calls(module, json.loads(text), tensors)

    for function in (describe, refuses, set_threads, stored, time_calls):
        ffi.register_global_func(f"topiarist.board.{function.__name__}", function, override=True)
    flush = ffi.get_global_func("cache_flush_cpu_non_first_arg")
    for count in range(1, MOST_CONSTANTS + 1):
        ffi.register_global_func(flusher(count), _flush_some(flush, count), override=True)


def _flush_some(flush: Callable[..., None], count: int) -> Callable[..., None]:
    """Flushes the arguments after the first one, so many of them."""
    return lambda *args: flush(*args[: count + 1])


def describe_board(cores: Cores) -> Board:
    """This machine as a board."""
    return Board(
        protocol=PROTOCOL,
        versions=runtime.versions(),
        architecture=linux.architecture(),
        device_model=_device_model(),
        cores=cores.name,
        core_count=len(cores.numbers),
        free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def _device_model() -> str:
    try:
        return " ".join(detect().device_model.split()) or "unknown"
    except TargetError:
        return "unknown"


def refusal(target: str) -> str:
    """Why this machine can't run code for a target, given as JSON; empty if it can."""
    try:
        spec = TargetSpec.from_json(json.loads(target))
        return runs_here(spec) or ""
    except (TargetError, ValueError, KeyError, TypeError) as error:
        return f"it can't tell whether it runs the target: {error}"


def timed_calls(module: Any, calls: Sequence[Any], tensors: Sequence[Any]) -> bytes:
    """Run `[name, [tensor numbers]]` in order; each call's seconds as bytes of doubles."""
    import numpy as np

    ready = [(module[name], [tensors[i] for i in at]) for name, at in calls]
    seconds = np.empty(len(ready))
    clock = time.perf_counter
    for i, (function, args) in enumerate(ready):
        start = clock()
        function(*args)
        seconds[i] = clock() - start
    return seconds.tobytes()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where everything lies that sessions leave on the board, until we end."""
    folder = Path(tempfile.mkdtemp(prefix="topiarist-board-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which services are stopped with, is like Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
