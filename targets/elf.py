"""What the head of an ELF file says: for which machine it is."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

MACHINES = {3: "i386", 40: "arm", 62: "x86-64", 183: "aarch64", 243: "riscv"}
_HEAD = 52  # bytes up to the end of e_flags in both classes
_SOFT_FLOAT, _HARD_FLOAT = 0x200, 0x400  # e_flags of 32-bit ARM


@dataclass(frozen=True)
class ElfHead:
    """Machine, word size and, on 32-bit ARM where it is told, how floats are passed."""

    machine: str
    bits: int
    float_abi: str = ""  # hard, soft

    def __str__(self) -> str:
        abi = f", {self.float_abi} float" if self.float_abi else ""
        return f"{self.machine} ({self.bits} bits{abi})"

    def serves(self, machine: str, bits: int) -> bool:
        """Whether it fits a machine of ours: 32-bit ARM passes floats in registers."""
        return (self.machine, self.bits) == (machine, bits) and self.float_abi != "soft"


def read(path: Path) -> ElfHead | None:
    """The head of a file, None if it is no ELF file. Raises OSError if it can't be read."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if len(head) < _HEAD or head[:4] != b"\x7fELF" or head[4] not in (1, 2):
        return None
    bits = 32 * head[4]
    order = ">" if head[5] == 2 else "<"
    (number,) = struct.unpack_from(f"{order}H", head, 18)
    machine = MACHINES.get(number, f"machine {number}")
    if order == ">":
        machine += ", big-endian"
    flags_at = 48 if bits == 64 else 36
    (flags,) = struct.unpack_from(f"{order}I", head, flags_at)
    return ElfHead(machine, bits, _float_abi(flags) if number == 40 else "")


def _float_abi(flags: int) -> str:
    if flags & _HARD_FLOAT:
        return "hard"
    return "soft" if flags & _SOFT_FLOAT else ""
