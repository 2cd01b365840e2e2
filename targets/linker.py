"""Linking a network for another kind of machine: which program does it, and what came out."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.errors import BuildError, TargetError
from topiarist.targets import elf, linux
from topiarist.targets.detect import architecture_of
from topiarist.targets.spec import TargetSpec
from topiarist.targets.toolchain import Toolchain

NDK_COMPILER = "toolchains/llvm/prebuilt/*/bin/clang++"
ANDROID_API = 24  # Android 7, the oldest that programs are linked for
ANDROID_PAGE = 16384  # bytes; newer devices have pages of this size
_PLAIN_LINKER = re.compile(r"(.*-)?(ld|ld\..*|ld-.*|mold)")
_LIBC = ("lib", "lib64", "usr/lib", "usr/lib64", "lib/*-linux-*", "usr/lib/*-linux-*")
_REASON = 500  # characters of what a linker said


@dataclass(frozen=True)
class LinkOptions:
    """What a user may say: another linker, the board's own libraries, Android's kit."""

    linker: Path | None = None
    sysroot: Path | None = None
    ndk: Path | None = None


AUTOMATIC = LinkOptions()


@dataclass(frozen=True)
class Linker:
    """Makes a shared library of object files, in the form that TVM's `export_library` calls.

    `command` is complete but for the output and the objects.
    """

    target: str
    command: tuple[str, ...]
    toolchain: Toolchain

    def __call__(self, output: str, objects: Sequence[str], **_: Any) -> None:
        """Link. Raises BuildError if it fails, or makes a library for another machine."""
        program = self.command[0]
        try:
            done = subprocess.run(
                [*self.command, "-o", output, *objects],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise BuildError(f"{program} can't be run: {error.strerror}") from error
        if done.returncode != 0:
            lines = dict.fromkeys((done.stderr or done.stdout).splitlines())
            reason = " ".join(" ".join(lines).split())[:_REASON]
            raise BuildError(f"{program} failed to link for {self.target}: {reason}")
        check_machine(Path(output), self.target, self.toolchain, f"{program} made a library")


def check_machine(path: Path, target: str, toolchain: Toolchain, what: str) -> None:
    """Raise BuildError unless the ELF file is for the toolchain's machine."""
    head = _head(path)
    if head is None or not head.serves(toolchain.machine, toolchain.bits):
        found = "nothing that is ELF" if head is None else str(head)
        raise BuildError(
            f"{what} for {found}, and {target} is {toolchain.machine} ({toolchain.bits} bits)"
        )


def find_linker(
    target: TargetSpec, options: LinkOptions = AUTOMATIC, search: str | None = None
) -> Linker | None:
    """What links for the target; None where this machine's own compiler does.

    `search` is where programs are looked for, the user's PATH unless given. Raises BuildError,
    which names the package to install, and TargetError if nothing can be compiled for it here.
    """
    toolchain, here = target.toolchain, linux.architecture()
    if toolchain is None:
        if target.family == "x86" and here != "x86_64":
            raise TargetError(f"{target.name} is compiled for on x86-64 only; this is {here}")
        if options != AUTOMATIC:
            raise ValueError(f"--linker, --sysroot and --ndk are for boards, not {target.name}")
        return None
    if options.ndk is not None and target.system != "android":
        raise ValueError(f"--ndk is for Android, and {target.name} runs {target.system.title()}")
    if options.sysroot is not None:
        _check_sysroot(options.sysroot, target.name, toolchain)
    if options == AUTOMATIC and architecture_of(target) == here and target.system == "linux":
        return None
    command = _command(target, toolchain, options, search)
    # Debian's own folder is where its compiler looks anyway, and no sysroot in GCC's sense.
    other_root = options.sysroot is not None and str(options.sysroot) != toolchain.sysroot
    root = (f"--sysroot={options.sysroot}",) if other_root else ()
    return Linker(target.name, (*command, "-shared", *root), toolchain)


def _command(
    target: TargetSpec, toolchain: Toolchain, options: LinkOptions, search: str | None
) -> tuple[str, ...]:
    if options.linker is not None:
        return _named(options.linker, target, toolchain, search)
    if target.system == "android":
        return _of_ndk(target, options.ndk)
    for name in (toolchain.compiler, f"{toolchain.prefix}-gcc"):
        if found := shutil.which(name, path=search):
            return (found, "-Wl,--as-needed")
    if found := _llvm_linker(search):
        return (found,)
    raise BuildError(
        f"a bundle for {target.name} is linked with {toolchain.compiler} or LLVM's ld.lld, and "
        f"neither is here: install the package {toolchain.package}, or lld"
    )


def _named(
    linker: Path, target: TargetSpec, toolchain: Toolchain, search: str | None
) -> tuple[str, ...]:
    """The linker or compiler that the user named."""
    found = shutil.which(str(linker), path=search)
    if found is None:
        raise BuildError(f"--linker {linker}: there is no such program")
    if _PLAIN_LINKER.fullmatch(linker.name):
        return (found,)
    if "clang" in linker.name:
        return (found, f"--target={target.triple}", "-Wl,--as-needed")
    machine = _machine_of(found)
    if not _alike(machine, toolchain):
        raise BuildError(
            f"--linker {linker} is for {machine or 'an unknown machine'}, and {target.name} is "
            f"{target.triple}; {toolchain.compiler or 'the NDK'} would do"
        )
    return (found, "-Wl,--as-needed")


def _machine_of(compiler: str) -> str:
    """What a compiler that follows GCC's habits says it compiles for."""
    try:
        done = subprocess.run(
            [compiler, "-dumpmachine"], capture_output=True, text=True, errors="replace", timeout=9
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _alike(machine: str, toolchain: Toolchain) -> bool:
    """`aarch64-poky-linux` is for aarch64, `arm-linux-gnueabi` not for floats in registers."""
    if toolchain.bits == 64:
        return machine.startswith("aarch64-")
    return machine.startswith("arm") and machine.endswith("hf")


def _llvm_linker(search: str | None) -> str | None:
    """`ld.lld`, or the newest of the versions that Debian names `ld.lld-19`."""
    versions = (f"-{number}" for number in range(30, 13, -1))
    names = (f"ld.lld{version}" for version in ("", *versions))
    return next((found for name in names if (found := shutil.which(name, path=search))), None)


def _of_ndk(target: TargetSpec, ndk: Path | None) -> tuple[str, ...]:
    if ndk is None:
        raise BuildError(
            f"a bundle for {target.name} is linked with Android's NDK: get it from "
            "https://developer.android.com/ndk and give its folder as --ndk"
        )
    compiler = next(iter(sorted(ndk.glob(NDK_COMPILER))), None)
    if compiler is None:
        raise BuildError(f"--ndk {ndk} is no Android NDK: it has no {NDK_COMPILER}")
    page = f"-Wl,-z,max-page-size={ANDROID_PAGE}"
    return (str(compiler), f"--target={target.triple}{ANDROID_API}", page, "-Wl,--as-needed")


def _head(path: Path) -> elf.ElfHead | None:
    """The head of an ELF file, None for anything else, such as a link to nowhere."""
    try:
        return elf.read(path)
    except OSError:
        return None


def _check_sysroot(sysroot: Path, target: str, toolchain: Toolchain) -> None:
    """Raise BuildError unless a C library of the target's machine is in the folder."""
    if not sysroot.is_dir():
        raise BuildError(f"--sysroot {sysroot} is no folder")
    found = (path for place in _LIBC for path in sorted(sysroot.glob(f"{place}/libc.so.6")))
    heads = [head for path in found if (head := _head(path)) is not None]
    if not heads:
        raise BuildError(
            f"--sysroot {sysroot} has no C library (lib/libc.so.6): it is the folder that holds "
            "a copy of the board's lib and usr/lib"
        )
    if not any(head.serves(toolchain.machine, toolchain.bits) for head in heads):
        raise BuildError(
            f"--sysroot {sysroot} is of {heads[0]}, and {target} is {toolchain.machine} "
            f"({toolchain.bits} bits)"
        )
