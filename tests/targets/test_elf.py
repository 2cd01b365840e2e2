"""Heads of ELF files, made up byte by byte, and one that is real."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from topiarist.targets import elf
from topiarist.targets.elf import ElfHead


def write_elf(path: Path, machine: int, bits: int, *, flags: int = 0, order: str = "<") -> Path:
    """A file that is nothing but the head."""
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    word = "Q" if bits == 64 else "I"
    rest = struct.pack(f"{order}HHI3{word}I6H", 3, machine, 1, 0, 0, 0, flags, *(6 * [0]))
    path.write_bytes(ident + rest)
    return path


@pytest.mark.parametrize(
    ("machine", "bits", "flags", "head"),
    [
        (183, 64, 0, ElfHead("aarch64", 64)),
        (62, 64, 0, ElfHead("x86-64", 64)),
        (40, 32, 0x5000400, ElfHead("arm", 32, "hard")),
        (40, 32, 0x5000200, ElfHead("arm", 32, "soft")),
        (40, 32, 0x5000000, ElfHead("arm", 32)),
        (9999, 64, 0, ElfHead("machine 9999", 64)),
    ],
)
def test_heads(machine: int, bits: int, flags: int, head: ElfHead, tmp_path: Path) -> None:
    assert elf.read(write_elf(tmp_path / "x", machine, bits, flags=flags)) == head


def test_big_endian(tmp_path: Path) -> None:
    head = elf.read(write_elf(tmp_path / "x", 183, 64, order=">"))
    assert head == ElfHead("aarch64, big-endian", 64) and not head.serves("aarch64", 64)


def test_what_serves_a_machine() -> None:
    assert ElfHead("aarch64", 64).serves("aarch64", 64)
    assert ElfHead("arm", 32, "hard").serves("arm", 32) and ElfHead("arm", 32).serves("arm", 32)
    assert not ElfHead("arm", 32, "soft").serves("arm", 32)
    assert not ElfHead("x86-64", 64).serves("aarch64", 64)
    assert str(ElfHead("arm", 32, "soft")) == "arm (32 bits, soft float)"


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\n" * 9, b"\x7fELF\x09" * 20])
def test_no_elf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert elf.read(tmp_path / "x") is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs an ELF program")
def test_a_real_program() -> None:
    head = elf.read(Path(sys.executable))
    assert head is not None and head.bits == (64 if sys.maxsize > 1 << 32 else 32)
