"""TVM's tracker: running one, and asking one which boards it knows."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from topiarist.errors import BoardError

PORT = 9190
CONNECT_S = 5.0
ANSWER_S = 10.0
WAIT_S = 60.0  # for a free board
_MAGIC = 0x2F271  # of the tracker's protocol, as in `tvm.rpc.base`

Say = Callable[[str], None]


@dataclass(frozen=True)
class Key:
    """What a tracker knows of a key: servers, of these free ones, and who waits for one."""

    key: str
    addresses: tuple[str, ...]
    free: int
    pending: int

    @property
    def in_use(self) -> int:
        """Servers that have a session, or that hang."""
        return max(len(self.addresses) - self.free, 0)


@dataclass(frozen=True)
class Lease:
    """A board that the tracker has given us."""

    host: str
    port: int
    match_key: str

    @property
    def address(self) -> str:
        """`10.0.0.5:9090`."""
        return f"{self.host}:{self.port}"


def parse_address(text: str, default_port: int | None = PORT) -> tuple[str, int]:
    """`host:port`, or `host` for the default port. Raises ValueError."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(default_port or ""))
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"an address is HOST:PORT, such as 192.168.1.10:{PORT}, got {text!r}")
    return host, int(port)


def run_tracker(host: str, port: int, say: Say) -> None:
    """Run TVM's tracker in this thread until interrupted. Raises BoardError for a port in use."""
    import asyncio

    from tvm.rpc import base, tracker

    tracker.logger.setLevel(logging.WARNING)
    sock = socket.socket(base.get_addr_family((host, port)), socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise BoardError(
            f"port {port} of {host} can't be had ({error.strerror}): is a tracker running there "
            "already? --port takes another"
        ) from error
    sock.listen()
    asyncio.set_event_loop(asyncio.new_event_loop())
    handler = tracker.TrackerServerHandler(sock, base.random_key("tracker"))
    say(f"the tracker listens on port {sock.getsockname()[1]} of {host}; Ctrl-C ends it")
    try:
        handler.run()
    finally:
        handler.stop()


class Tracker:
    """A connection to a tracker. Raises BoardError, which says what is wrong, in every method."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.name = f"{address[0]}:{address[1]}"
        self._sock = _connect(address, self.name)
        try:
            self._sock.settimeout(ANSWER_S)
            self._sock.sendall(struct.pack("<i", _MAGIC))
            answer = self._sock.recv(4, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        if answer != struct.pack("<i", _MAGIC):
            self.close()
            raise BoardError(
                f"{self.name} answers, but is no RPC tracker: is that the port of `topiarist board "
                f"tracker` ({PORT} unless it says another)?"
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def known_keys(self) -> list[Key]:
        """All keys that boards have, or that somebody waits for."""
        from tvm.rpc.base import TrackerCode

        value = self._ask([TrackerCode.SUMMARY], ANSWER_S)
        queues, servers = value["queue_info"], value["server_info"]
        names = {s["key"].partition(":")[2] for s in servers}
        names |= {name for name, queue in queues.items() if queue["pending"]}
        return [
            Key(
                name,
                tuple(sorted(
                    f"{s['addr'][0]}:{s['addr'][1]}"
                    for s in servers
                    if s["key"].partition(":")[2] == name
                )),
                queues.get(name, {}).get("free", 0),
                queues.get(name, {}).get("pending", 0),
            )
            for name in sorted(names)
        ]  # fmt: skip

    def find(self, key: str) -> Key:
        """A key that boards have."""
        keys = [found for found in self.known_keys() if found.addresses]
        for found in keys:
            if found.key == key:
                return found
        others = ", ".join(repr(found.key) for found in keys) or "none"
        raise BoardError(
            f"the tracker {self.name} knows no board of the key {key!r} (keys: {others}): on the "
            f"board, run `topiarist board serve --tracker {self.name} --key {key}`"
        )

    def request(self, key: str, wait_s: float = WAIT_S) -> Lease:
        """A board of the key, as soon as one is free."""
        from tvm.rpc.base import TrackerCode

        host, port, match_key = self._ask(
            [TrackerCode.REQUEST, key, "", 1],
            wait_s,
            late=f"no board of the key {key!r} was free for {wait_s:g} s",
        )
        return Lease(host, port, match_key)

    def _ask(self, message: list[Any], limit_s: float, late: str = "") -> Any:
        from tvm.rpc import base

        self._sock.settimeout(limit_s)
        try:
            base.sendjson(self._sock, message)
            code, value = base.recvjson(self._sock)
        except TimeoutError as error:
            self.close()
            raise BoardError(late or f"the tracker {self.name} gives no answer") from error
        except (OSError, ValueError, TypeError, struct.error) as error:
            self.close()
            raise BoardError(f"the tracker {self.name} is gone: {error}") from error
        if code != base.TrackerCode.SUCCESS:
            raise BoardError(f"the tracker {self.name} refuses: {value}")
        return value


def _connect(address: tuple[str, int], name: str) -> socket.socket:
    try:
        return socket.create_connection(address, CONNECT_S)
    except socket.gaierror as error:
        raise BoardError(f"there is no host {address[0]!r} ({error.strerror})") from error
    except ConnectionRefusedError as error:
        raise BoardError(
            f"the tracker can't be reached: {address[0]} has nothing that listens on port "
            f"{address[1]}; start one there, `topiarist board tracker --port {address[1]}`"
        ) from error
    except TimeoutError as error:
        raise BoardError(
            f"the tracker can't be reached: {name} gives no answer within {CONNECT_S:g} s; is the "
            "machine on, and does a firewall let the port through?"
        ) from error
    except OSError as error:
        raise BoardError(f"the tracker {name} can't be reached: {error.strerror}") from error
