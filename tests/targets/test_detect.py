"""Detection from made-up /proc and /sys files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from topiarist.errors import TargetError
from topiarist.targets import detect, linux, registry, x86
from topiarist.targets.spec import TargetSpec

FEATURES = {isa.name: isa.features for isa in x86.INSTRUCTION_SETS}


@pytest.fixture(autouse=True)
def _an_x86_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def write_cpuinfo(folder: Path, flags: tuple[str, ...], model: str = "Some CPU @ 3 GHz") -> Path:
    path = folder / "cpuinfo"
    processor = f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {' '.join(flags)}\n\n"
    path.write_text(processor * 2)
    return path


def detected(cpuinfo: Path) -> TargetSpec:
    return detect.detect(linux.Sources(cpuinfo, cpuinfo.parent / "none", cpuinfo.parent / "none"))


def write_cache(folder: Path, index: int, level: str, kind: str, size: str) -> None:
    entry = folder / f"index{index}"
    entry.mkdir(parents=True)
    for name, value in (("level", level), ("type", kind), ("size", size)):
        (entry / name).write_text(value + "\n")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse4"])
def test_picks_the_widest_set(tmp_path: Path, isa: str) -> None:
    spec = detected(write_cpuinfo(tmp_path, (*FEATURES[isa], "fpu")))
    profile = registry.get(f"x86-{isa}")
    assert (spec.isa, spec.lanes, spec.registers) == (isa, profile.lanes, profile.registers)
    assert spec.tvm_target["mcpu"] == profile.tvm_target["mcpu"]
    assert spec.tvm_target["num-cores"] == spec.cores >= 1
    assert spec.device_model == "Some CPU @ 3 GHz"


@pytest.mark.parametrize("missing", ["avx512bw", "avx512dq", "avx512vl"])
def test_partial_avx512_is_avx2(tmp_path: Path, missing: str) -> None:
    flags = tuple(f for f in FEATURES["avx512"] if f != missing)
    assert detected(write_cpuinfo(tmp_path, flags)).isa == "avx2"


def test_avx2_without_fma_is_sse4(tmp_path: Path) -> None:
    flags = tuple(f for f in FEATURES["avx2"] if f != "fma")
    assert detected(write_cpuinfo(tmp_path, flags)).isa == "sse4"


def test_too_old_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"Some CPU @ 3 GHz has no SSE4\.2"):
        detected(write_cpuinfo(tmp_path, ("sse2",)))


def test_no_cpuinfo(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="only Linux is supported"):
        detected(tmp_path / "absent")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(TargetError, match=r"riscv64.*targets list"):
        detect.detect()
    reason = detect.runs_here(registry.get("x86-sse4"))
    assert reason is not None and "riscv64" in reason


def test_cache_sizes(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, "1", "Data", "48K")
    write_cache(tmp_path, 1, "1", "Instruction", "64K")
    write_cache(tmp_path, 2, "2", "Unified", "2048K")
    write_cache(tmp_path, 3, "3", "Unified", "32M")
    expected = {"l1d": 48 * 1024, "l2": 2 << 20, "l3": 32 << 20}
    assert linux.read_cache_sizes(tmp_path) == expected


@pytest.mark.parametrize("size", ["", "many", "K", "12"])
def test_unreadable_cache_sizes_fall_back(tmp_path: Path, size: str) -> None:
    write_cache(tmp_path, 0, "1", "Data", size)
    assert linux.read_cache_sizes(tmp_path) == linux.read_cache_sizes(tmp_path / "absent")


def test_runs_here_names_what_is_missing(tmp_path: Path) -> None:
    cpuinfo = write_cpuinfo(tmp_path, FEATURES["avx2"])
    assert detect.runs_here(registry.get("x86-avx2"), cpuinfo) is None
    assert detect.runs_here(registry.get("x86-sse4"), cpuinfo) is None
    reason = detect.runs_here(registry.get("x86-avx512"), cpuinfo)
    assert reason is not None and "avx512f" in reason and "fma" not in reason
