"""Detection on ARM, from what Linux shows on real machines (`cpuinfo/`)."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from topiarist.errors import TargetError
from topiarist.targets import arm, detect, detect_arm, linux, registry
from topiarist.targets.spec import TargetSpec

CPUINFO = Path(__file__).parent / "cpuinfo"
ALL_CPUS = range(64)
Machine = Callable[..., TargetSpec]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Detects a machine of `cpuinfo/`, its device tree's names and its clocks by CPU number."""

    def detected(
        name: str,
        *,
        compatible: str = "",
        ghz: dict[int, float] | None = None,
        architecture: str = "aarch64",
    ) -> TargetSpec:
        (tmp_path / "compatible").write_text(compatible)
        for cpu, clock in (ghz or {}).items():
            folder = tmp_path / f"cpu{cpu}" / "cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{clock * 1e6:.0f}\n")
        sources = linux.Sources(CPUINFO / f"{name}.txt", tmp_path, tmp_path / "compatible")
        return detect_arm.host(sources, architecture, ALL_CPUS)

    return detected


@pytest.mark.parametrize(
    ("board", "compatible"),
    [
        ("rpi3", "raspberrypi,3-model-b-plus\0brcm,bcm2837\0"),
        ("rpi4", "raspberrypi,4-model-b\0brcm,bcm2711\0"),
        ("rpi5", "raspberrypi,5-model-b\0brcm,bcm2712\0"),
        ("rk3399", "pine64,rockpro64-v2.1\0pine64,rockpro64\0rockchip,rk3399\0"),
        ("rk3588", "radxa,rock-5b\0rockchip,rk3588\0"),
    ],
)
def test_boards_are_recognised(board: str, compatible: str, machine: Machine) -> None:
    """The board is tuned for under one name, here and from another machine."""
    host, profile = machine(board, compatible=compatible), registry.get(board)
    assert (host.name, host.device_model) == ("host", profile.device_model)
    assert host.tvm_target == profile.tvm_target
    assert host.required_features == profile.required_features
    assert host.cores == profile.cores and host.l2_bytes == profile.l2_bytes
    assert [c.mcpu for c in host.clusters] == [c.mcpu for c in profile.clusters]
    assert host.peak_gflops is None and host.bandwidth_gbs is None  # both are measured


@pytest.mark.parametrize(
    ("name", "mcpu", "model", "extensions"),
    [
        ("graviton2", "neoverse-n1", "Neoverse-N1", {"+dotprod", "+fullfp16", "-sve"}),
        ("graviton3", "neoverse-v1", "Neoverse-V1", {"+dotprod", "+fullfp16", "+sve"}),
        ("kryo485", "cortex-a76", "Cortex-A76 and Cortex-A55", {"+dotprod", "+fullfp16", "-sve"}),
        ("m1", "generic", "", {"+dotprod", "+fullfp16", "-sve"}),
        ("rpi4", "cortex-a72", "Cortex-A72", {"-dotprod", "-fullfp16", "-sve"}),
    ],
)
def test_cores_without_a_known_board(
    name: str, mcpu: str, model: str, extensions: set[str], machine: Machine
) -> None:
    host = machine(name)
    assert (host.mcpu, host.device_model) == (mcpu, model)
    assert set(host.tvm_target["mattr"]) == extensions


def test_a_machine_of_unknown_cores_is_named_as_its_device_tree_does(machine: Machine) -> None:
    host = machine("m1", compatible="apple,j274\0apple,t8103\0apple,arm-platform\0")
    assert host.device_model == "apple,j274"


def test_code_is_for_the_fastest_cores(machine: Machine) -> None:
    host = machine("rk3588", ghz=dict.fromkeys(range(4), 1.8) | dict.fromkeys(range(4, 8), 2.25))
    big, little = host.clusters
    assert (big.mcpu, big.cores, big.clock_ghz) == ("cortex-a76", 4, 2.25)
    assert (little.mcpu, little.cores, little.clock_ghz) == ("cortex-a55", 4, 1.8)
    assert host.cores == 4 and host.out_of_order


def test_caches_are_those_of_a_fast_core(machine: Machine, tmp_path: Path) -> None:
    for cpu, size in ((0, "32K"), (4, "48K")):
        index = tmp_path / f"cpu{cpu}" / "cache" / "index0"
        index.mkdir(parents=True)
        for name, value in (("level", "1"), ("type", "Data"), ("size", size)):
            (index / name).write_text(value)
    assert machine("rk3399").l1d_bytes == 48 * 1024


def test_processors_that_a_process_may_use() -> None:
    sources = linux.Sources(CPUINFO / "rk3588.txt", Path("none"), Path("none"))
    host = detect_arm.host(sources, "aarch64", [0, 1])
    assert (host.mcpu, host.cores) == ("cortex-a55", 2)


@pytest.mark.parametrize("name", ["rpi2", "rpi4"])
def test_32_bit_programs(name: str, machine: Machine) -> None:
    """On a 64-bit Linux, which calls NEON asimd, they need the same code."""
    host = machine(name, architecture="armv7l")
    assert (host.isa, host.registers, host.lane_fma) == ("neon-v7", 16, False)
    assert host.triple == "armv7l-linux-gnueabihf"
    assert host.mcpu == {"rpi2": "cortex-a7", "rpi4": "cortex-a72"}[name]


def test_detect_reads_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    sources = linux.Sources(CPUINFO / "rpi4.txt", Path("none"), Path("none"))
    assert detect.detect(sources).mcpu == "cortex-a72"


def test_too_old_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "armv7l")
    sources = linux.Sources(CPUINFO / "pi1.txt", Path("none"), Path("none"))
    with pytest.raises(TargetError, match="lacks neon, vfpv4, the least"):
        detect.detect(sources)


@pytest.mark.parametrize(
    ("here", "cpuinfo", "target", "problem"),
    [
        ("aarch64", "rpi4", "rpi4", None),
        ("aarch64", "rpi5", "rpi4", None),
        ("aarch64", "rpi4", "rpi5", r"lacks asimddp, asimdhp, fphp, which rpi5 \(neon\) needs"),
        ("aarch64", "graviton2", "graviton3", "lacks sve"),
        ("aarch64", "rpi4", "armv7", "is 32-bit ARM and this machine is 64-bit ARM"),
        ("aarch64", "rpi4", "x86-avx2", "is x86-64 and this machine is 64-bit ARM"),
        ("aarch64", "rpi5", "android", "is for Android and this is Linux"),
        ("armv7l", "rpi2", "armv7", None),
        ("armv7l", "rpi4", "armv7", None),
        ("armv7l", "rpi4", "rpi4", "is 64-bit ARM and this machine is 32-bit ARM"),
        ("x86_64", "rpi4", "rpi4", "is 64-bit ARM and this machine is x86-64"),
    ],
)
def test_runs_here(
    here: str, cpuinfo: str, target: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: here)
    reason = detect.runs_here(registry.get(target), CPUINFO / f"{cpuinfo}.txt")
    assert reason is None if problem is None else re.search(problem, reason or "")


def test_a_32_bit_program_on_a_64_bit_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert linux.architecture() == "armv7l"


def test_every_feature_has_flags_that_linux_shows() -> None:
    shown = linux.read_processors(CPUINFO / "graviton3.txt")[0]["Features"].split()
    assert {flag for feature in arm.FEATURES.values() for flag in feature.flags} <= {*shown}
