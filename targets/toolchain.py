"""The tools that make and try programs for another kind of machine, by LLVM triple."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Toolchain:
    """What a triple's programs are linked with, and run with on another machine.

    `prefix` starts the names of the GNU tools, `package` is Debian's package of them, `emulator`
    QEMU's program for one process (in `emulator_package`), `sysroot` where the package puts the
    machine's libraries. `machine` and `bits` are what the head of an ELF file has to say.
    `plain_cpu` is QEMU's name of a processor with no more than all such machines have,
    `wheel_platform` pip's name of the machine, where there are wheels of TVM for it.
    """

    prefix: str
    package: str
    emulator: str
    sysroot: str
    machine: str  # as in `elf.MACHINES`
    bits: int
    plain_cpu: str
    wheel_platform: str = ""
    emulator_package: str = "qemu-user"

    @property
    def compiler(self) -> str:
        """The C++ compiler, which links."""
        return f"{self.prefix}-g++"


AARCH64 = Toolchain(
    prefix="aarch64-linux-gnu",
    package="g++-aarch64-linux-gnu",
    emulator="qemu-aarch64",
    sysroot="/usr/aarch64-linux-gnu",
    machine="aarch64",
    bits=64,
    plain_cpu="cortex-a53",
    wheel_platform="manylinux_2_28_aarch64",
)
ARM_HARD_FLOAT = Toolchain(
    prefix="arm-linux-gnueabihf",
    package="g++-arm-linux-gnueabihf",
    emulator="qemu-arm",
    sysroot="/usr/arm-linux-gnueabihf",
    machine="arm",
    bits=32,
    plain_cpu="cortex-a15",
)
TOOLCHAINS = {
    "aarch64-linux-gnu": AARCH64,
    "armv7l-linux-gnueabihf": ARM_HARD_FLOAT,
}
