"""The tools that make and try programs for another kind of machine, by LLVM triple."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Toolchain:
    """What a triple's programs are linked with, and run with on another machine.

    `prefix` starts the names of the GNU tools, `package` is Debian's package of them, `emulator`
    QEMU's program for one process (in `emulator_package`), `sysroot` where the package puts the
    machine's libraries. All of these are empty where only a vendor's kit has them (Android's NDK).
    `machine` and `bits` are what the head of an ELF file has to say (`elf.py`).
    """

    machine: str
    bits: int
    prefix: str = ""
    package: str = ""
    emulator: str = ""
    emulator_package: str = ""
    sysroot: str = ""

    @property
    def compiler(self) -> str:
        """The C++ compiler, which links; empty where only a vendor's kit has one."""
        return f"{self.prefix}-g++" if self.prefix else ""


AARCH64 = Toolchain(
    machine="aarch64",
    bits=64,
    prefix="aarch64-linux-gnu",
    package="g++-aarch64-linux-gnu",
    emulator="qemu-aarch64",
    emulator_package="qemu-user",
    sysroot="/usr/aarch64-linux-gnu",
)
ARM_HARD_FLOAT = Toolchain(
    machine="arm",
    bits=32,
    prefix="arm-linux-gnueabihf",
    package="g++-arm-linux-gnueabihf",
    emulator="qemu-arm",
    emulator_package="qemu-user",
    sysroot="/usr/arm-linux-gnueabihf",
)
ANDROID = Toolchain(machine="aarch64", bits=64)
TOOLCHAINS = {
    "aarch64-linux-gnu": AARCH64,
    "armv7l-linux-gnueabihf": ARM_HARD_FLOAT,
    "aarch64-linux-android": ANDROID,
}
