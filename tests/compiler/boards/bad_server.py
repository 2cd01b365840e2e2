"""A board with something wrong: TVM's server with ours functions, as `board serve` runs it."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from topiarist.compiler import runtime
from topiarist.compiler.boards import server
from topiarist.compiler.boards.board import Cores
from topiarist.targets import linux
from topiarist.targets.detect import detect, runs_here

# The opcode that follows the prefix of vfmadd231ps (VEX or EVEX), and that of vfnmadd231ps.
_FMA = re.compile(rb"(\xc4[\x00-\xff]{2}|\x62[\x00-\xff]{3})\xb8")


class Silent:
    """Nobody asks for the port."""

    def send(self, message: object) -> None:
        if isinstance(message, str):
            sys.exit(message)


def old() -> None:
    """A TVM of another version."""
    describe = server.describe_board

    def describe_old(cores: Cores) -> Any:
        board = describe(cores)
        return replace(board, versions={**board.versions, "apache-tvm": "0.26.0"})

    server.describe_board = describe_old  # type: ignore[assignment]


def garbage() -> None:
    """A processor that subtracts where it should add."""
    runtime.load()
    import tvm.rpc.server

    load = tvm.rpc.server._load_module

    def load_wrong(path: str) -> Any:
        code = Path(path).read_bytes()
        Path(path).write_bytes(_FMA.sub(lambda found: found[1] + b"\xbc", code))
        return load(path)

    tvm.rpc.server._load_module = load_wrong


def full() -> None:
    """A disk on which a file of 4 KB finds no place."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def plain() -> None:
    """TVM's own server, without functions of ours."""
    server._register = lambda cores: None  # type: ignore[assignment]


def emulated() -> None:
    """No fault: QEMU shows the processor of the machine that it runs on; here is another."""
    cpuinfo = Path(tempfile.mkdtemp()) / "cpuinfo"
    core = "CPU implementer\t: 0x41\nCPU part\t: 0xd08\nFeatures\t: fp asimd\n"
    cpuinfo.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    sources = linux.Sources(cpuinfo=cpuinfo)
    server.detect = lambda: detect(sources)  # type: ignore[assignment,misc]
    server.runs_here = lambda spec: runs_here(spec, cpuinfo)  # type: ignore[assignment,misc]


def main(fault: str, tracker_port: str, key: str) -> None:
    faults = {f.__name__: f for f in (old, garbage, full, plain, emulated)}
    faults[fault]()
    cpus = tuple(linux.available_cpus())
    options = server.ServeOptions(
        *(("127.0.0.1", int(tracker_port)), key, Cores(cpus, "")),
        host="127.0.0.1",
        port=int(tracker_port) + 1,
        port_end=65535,
    )
    with tempfile.TemporaryDirectory() as folder:
        server.run_server(Silent(), options, folder, os.getppid())  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
