"""The boards that come with the package: sane data, and code for the right machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from tvm.script import from_source
from tvm.script import tirx as T

from tests.targets.test_codegen import SOURCE
from topiarist.targets import arm, board_file, elf, llvm
from topiarist.targets.cores import CORES
from topiarist.targets.explain import describe
from topiarist.targets.spec import TargetSpec

SPECS = {board.spec.name: board.spec for board in board_file.boards()}
MUST_BE_THERE = {
    *("rpi3", "rpi4", "rpi5", "rk3399", "rk3588", "phone-a55", "phone-a76", "jetson-orin"),
    *("graviton2", "graviton3", "android", "aarch64", "armv7"),
}
each_board = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def test_which_boards_there_are() -> None:
    assert SPECS.keys() >= MUST_BE_THERE


@each_board
def test_figures_are_of_this_world(spec: TargetSpec) -> None:
    assert 16 << 10 <= spec.l1d_bytes <= 128 << 10
    assert spec.l1d_bytes < spec.l2_bytes <= 2 << 20
    assert spec.l3_bytes == 0 or spec.l3_bytes > spec.l2_bytes
    assert spec.clock_ghz and 1 <= spec.clock_ghz <= 4
    assert spec.fma_per_cycle and spec.bandwidth_gbs and 1 <= spec.bandwidth_gbs <= 50
    assert spec.peak_gflops == round(2 * 4 * spec.fma_per_cycle * spec.clock_ghz, 1)
    assert spec.out_of_order is not None
    assert spec.cores == spec.clusters[0].cores == spec.tvm_target["num-cores"]
    assert (spec.registers, spec.lane_fma) == ((16, False) if spec.name == "armv7" else (32, True))


def test_names_of_device_trees_are_of_one_board() -> None:
    names = [name for board in board_file.boards() for name in board.compatible]
    assert len(names) == len(set(names))


@each_board
def test_llvm_knows_the_cores(spec: TargetSpec) -> None:
    names = {cluster.mcpu for cluster in spec.clusters} - {board_file.GENERIC}
    assert names <= llvm.processors(spec.triple)


@pytest.mark.parametrize("triple", arm.SETS)
def test_llvm_knows_the_core_table(triple: str) -> None:
    """So that a board file with one of them need not ask."""
    neon = arm.SETS[triple] is arm.NEON
    asked = {core.mcpu for core in CORES if core.aarch64 == neon}
    assert asked <= llvm.processors(triple)


@each_board
def test_code_is_for_the_board(spec: TargetSpec, tmp_path: Path) -> None:
    source = SOURCE.format(lanes=spec.lanes, count=256 // spec.lanes)
    module = tvm.IRModule({"k": from_source(source, extra_vars={"T": T})})
    built = tvm.compile(module, target=tvm.target.Target(spec.tvm_target))
    built.mod.write_to_file(str(tmp_path / "k.o"))
    toolchain, head = spec.toolchain, elf.read(tmp_path / "k.o")
    assert toolchain is not None and head is not None
    assert head.serves(toolchain.machine, toolchain.bits)
    assert "fmla" in built.mod.inspect_source("asm") or spec.name == "armv7"


@each_board
def test_every_board_is_explained(spec: TargetSpec) -> None:
    rows = dict(describe(spec))
    assert spec.device_model == rows["device"]
    assert spec.clusters[0].mcpu in rows["cores"]
    assert ("NDK" in rows["linked with"]) == (spec.system == "android")
