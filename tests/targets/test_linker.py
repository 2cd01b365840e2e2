"""Which program links for another machine, with PATHs of made-up programs."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.targets.test_elf import write_elf
from topiarist.errors import BuildError, TargetError
from topiarist.targets import registry
from topiarist.targets.linker import LinkOptions, find_linker

RPI4, ANDROID, ARMV7 = (registry.get(name) for name in ("rpi4", "android", "armv7"))


@pytest.fixture(autouse=True)
def _an_x86_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def program(folder: Path, name: str, script: str = "exit 0") -> Path:
    """A program of this name that does what the script says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def chosen(folder: Path, target: str = "rpi4", options: LinkOptions | None = None) -> list[str]:
    """The command for a target, where only the programs in the folder exist."""
    linker = find_linker(registry.get(target), options or LinkOptions(), str(folder))
    assert linker is not None
    return list(linker.command)


def test_a_cross_compiler_goes_before_gcc_and_llvm(tmp_path: Path) -> None:
    lld = program(tmp_path, "ld.lld-19")
    assert chosen(tmp_path) == [str(lld), "-shared"]
    program(tmp_path, "ld.lld-14")
    assert chosen(tmp_path)[0] == str(lld)
    plain = program(tmp_path, "ld.lld")
    assert chosen(tmp_path)[0] == str(plain)
    gcc = program(tmp_path, "aarch64-linux-gnu-gcc")
    assert chosen(tmp_path) == [str(gcc), "-Wl,--as-needed", "-shared"]
    gxx = program(tmp_path, "aarch64-linux-gnu-g++")
    assert chosen(tmp_path)[0] == str(gxx)
    assert chosen(tmp_path, "armv7")[0] == str(plain)


@pytest.mark.parametrize(
    ("target", "package"), [("rpi4", "g++-aarch64-linux-gnu"), ("armv7", "g++-arm-linux-gnueabihf")]
)
def test_no_linker_names_the_package(target: str, package: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=rf"install the package {package.replace('+', '.')}, or l"):
        chosen(tmp_path, target)


def test_this_machines_own_code_is_linked_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_linker(registry.get("x86-avx2")) is None
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert find_linker(RPI4) is None
    with pytest.raises(BuildError, match="arm-linux-gnueabihf"):
        find_linker(ARMV7, search="")
    with pytest.raises(TargetError, match="x86-avx2 is compiled for on x86-64 only"):
        find_linker(registry.get("x86-avx2"))


def test_options_that_a_target_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for boards, not x86-avx2"):
        find_linker(registry.get("x86-avx2"), LinkOptions(sysroot=tmp_path))
    with pytest.raises(ValueError, match="--ndk is for Android, and rpi4 runs Linux"):
        find_linker(RPI4, LinkOptions(ndk=tmp_path))


@pytest.mark.parametrize(
    ("name", "says", "problem"),
    [
        ("aarch64-poky-linux-g++", "aarch64-poky-linux", None),
        ("cc", "aarch64-linux-gnu", None),
        ("cc", "x86_64-linux-gnu", "is for x86_64-linux-gnu, and rpi4 is aarch64-linux-gnu; aarch"),
        ("cc", "", "is for an unknown machine"),
    ],
)
def test_a_compiler_of_the_users(name: str, says: str, problem: str | None, tmp_path: Path) -> None:
    path = program(tmp_path, name, f"echo {says}")
    options = LinkOptions(linker=path)
    if problem is None:
        assert chosen(tmp_path, options=options) == [str(path), "-Wl,--as-needed", "-shared"]
    else:
        with pytest.raises(BuildError, match=problem):
            chosen(tmp_path, options=options)


def test_another_compiler_for_android(tmp_path: Path) -> None:
    other = program(tmp_path, "cc", "echo x86_64-linux-gnu")
    with pytest.raises(BuildError, match="and android is aarch64-linux-android; the NDK would do"):
        chosen(tmp_path, "android", LinkOptions(linker=other))


def test_soft_float_is_another_machine(tmp_path: Path) -> None:
    soft = program(tmp_path, "soft", "echo arm-linux-gnueabi")
    with pytest.raises(BuildError, match="is for arm-linux-gnueabi, and armv7 is armv7l-linux-gn"):
        chosen(tmp_path, "armv7", LinkOptions(linker=soft))
    hard = program(tmp_path, "hard", "echo arm-none-linux-gnueabihf")
    assert chosen(tmp_path, "armv7", LinkOptions(linker=hard))[0] == str(hard)


def test_linkers_and_clang_serve_all_machines(tmp_path: Path) -> None:
    lld, clang = program(tmp_path, "ld.lld-17"), program(tmp_path, "clang++-17")
    assert chosen(tmp_path, options=LinkOptions(linker=lld)) == [str(lld), "-shared"]
    assert chosen(tmp_path, options=LinkOptions(linker=Path("clang++-17"))) == [
        *(str(clang), "--target=aarch64-linux-gnu", "-Wl,--as-needed", "-shared")
    ]
    with pytest.raises(BuildError, match="--linker absent: there is no such program"):
        chosen(tmp_path, options=LinkOptions(linker=Path("absent")))


def test_android_is_linked_with_the_ndk(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"linked with Android's NDK: get it from .* as --ndk"):
        find_linker(ANDROID)
    with pytest.raises(BuildError, match="is no Android NDK: it has no toolchains/llvm"):
        find_linker(ANDROID, LinkOptions(ndk=tmp_path))
    clang = program(tmp_path / "toolchains/llvm/prebuilt/linux-x86_64/bin", "clang++")
    linker = find_linker(ANDROID, LinkOptions(ndk=tmp_path))
    assert linker is not None
    assert linker.command[:2] == (str(clang), "--target=aarch64-linux-android24")


@pytest.mark.parametrize("place", ["lib", "usr/lib/aarch64-linux-gnu", "lib64"])
def test_a_sysroot(place: str, tmp_path: Path) -> None:
    program(tmp_path, "aarch64-linux-gnu-g++")
    root = tmp_path / "root"
    options = LinkOptions(sysroot=root)
    with pytest.raises(BuildError, match="root is no folder"):
        chosen(tmp_path, options=options)
    (root / place).mkdir(parents=True)
    libc = root / place / "libc.so.6"
    libc.symlink_to("nowhere")
    with pytest.raises(BuildError, match="has no C library"):
        chosen(tmp_path, options=options)
    libc.unlink()
    write_elf(libc, 62, 64)
    with pytest.raises(BuildError, match=r"is of x86-64 \(64 bits\), and rpi4 is aarch64"):
        chosen(tmp_path, options=options)
    write_elf(libc, 183, 64)
    assert f"--sysroot={root}" in chosen(tmp_path, options=options)


def test_debians_own_folder_needs_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topiarist.targets.linker._check_sysroot", lambda *_: None)
    program(tmp_path, "aarch64-linux-gnu-g++")
    options = LinkOptions(sysroot=Path("/usr/aarch64-linux-gnu"))
    assert chosen(tmp_path, options=options) == chosen(tmp_path)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo no >&2; echo no >&2; exit 1", "failed to link for rpi4: no$"),
        ('cp "$(dirname "$0")/x86.so" "$4"', r"made a library for x86-64 \(64 bits\), and rpi4 is"),
        ('echo text > "$4"', "made a library for nothing that is ELF"),
        ("exit 0", "made a library for nothing that is ELF"),
        ('cp "$(dirname "$0")/arm.so" "$4"', None),
    ],
)
def test_what_came_out_is_checked(script: str, problem: str | None, tmp_path: Path) -> None:
    write_elf(tmp_path / "x86.so", 62, 64)
    write_elf(tmp_path / "arm.so", 183, 64)
    program(tmp_path, "aarch64-linux-gnu-g++", script)
    linker = find_linker(RPI4, search=str(tmp_path))
    assert linker is not None
    output = str(tmp_path / "lib.so")
    if problem is None:
        linker(output, ["a.o"])
    else:
        with pytest.raises(BuildError, match=problem):
            linker(output, ["a.o"])


def test_a_program_that_cannot_run(tmp_path: Path) -> None:
    path = program(tmp_path, "aarch64-linux-gnu-g++")
    linker = find_linker(RPI4, search=str(tmp_path))
    path.write_bytes(b"\x7fELF nothing")
    assert linker is not None
    with pytest.raises(BuildError, match=r"aarch64-linux-gnu-g\+\+ can't be run: Exec format"):
        linker(str(tmp_path / "lib.so"), [])
