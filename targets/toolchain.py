"""The tools that make and try programs for another kind of machine, by LLVM triple."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Toolchain:
    """What a triple's programs are linked with, and run with on another machine.

    `prefix` starts the names of the GNU tools, `package` is Debian's package of them, `emulator`
    QEMU's program for one process (in `emulator_package`), `plain_cpu` its name of a processor
    that has only what all such machines have, `sysroot` where the package puts the machine's
    libraries. All of these are empty where only a vendor's kit has them (Android's NDK).
    `wheel_platform` is pip's name of the machine, where there are wheels of TVM for it. `machine`
    and `bits` are what the head of an ELF file has to say (`elf.py`).
    """

    machine: str
    bits: int
    prefix: str = ""
    package: str = ""
    emulator: str = ""
    emulator_package: str = ""
    plain_cpu: str = ""
    sysroot: str = ""
    wheel_platform: str = ""

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
    plain_cpu="cortex-a53",
    sysroot="/usr/aarch64-linux-gnu",
    wheel_platform="manylinux_2_28_aarch64",
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
