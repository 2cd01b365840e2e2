"""Boards that users describe: what is right becomes a target, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from topiarist.errors import TargetError
from topiarist.targets import board_file, registry

GOOD = """
model = "My board"
triple = "aarch64-linux-gnu"
features = ["dotprod"]

[[cores]]
mcpu = "cortex-a55"
count = 4
clock_ghz = 1.9
l1d_kib = 32
l2_kib = 128
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of targets."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    board_file.user_folder().mkdir(parents=True)
    return board_file.user_folder()


def write(folder: Path, text: str = GOOD, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_file(tmp_path: Path) -> None:
    spec = registry.get(str(write(tmp_path)))
    assert (spec.name, spec.device_model, spec.mcpu) == ("mine", "My board", "cortex-a55")
    assert (spec.cores, spec.l1d_bytes, spec.l3_bytes) == (4, 32 * 1024, 0)
    assert spec.peak_gflops == 15.2 and spec.out_of_order is False and spec.bandwidth_gbs is None
    assert "asimddp" in spec.required_features and "+dotprod" in spec.tvm_target["mattr"]


def test_a_file_in_the_users_folder_has_a_name(folder: Path) -> None:
    assert "mine" not in registry.names()
    write(folder)
    assert registry.names()[-1] == "mine"
    assert registry.get("mine").device_model == "My board"
    with pytest.raises(TargetError, match="did you mean mine"):
        registry.get("mine2")


def test_a_board_of_the_users_is_recognised(folder: Path) -> None:
    assert board_file.board_of(["maker,mine"]) is None
    write(folder, replaced("[[cores]]", 'compatible = ["maker,mine"]\n[[cores]]'))
    write(folder, "nothing that could be read", "wrong.toml")
    board = board_file.board_of(["maker,other", "maker,mine"])
    assert board is not None and board.spec.name == "mine"


def test_a_core_that_only_llvm_knows(tmp_path: Path) -> None:
    text = replaced('"cortex-a55"', '"cortex-a520"')
    with pytest.raises(TargetError, match=r"only the name: add fma_per_cycle .* and out_of_order"):
        board_file.read(write(tmp_path, text))
    more = text.replace("count = 4", "count = 4\nfma_per_cycle = 2\nout_of_order = false")
    cluster = board_file.read(write(tmp_path, more)).spec.clusters[0]
    assert (cluster.mcpu, cluster.fma_per_cycle, cluster.out_of_order) == ("cortex-a520", 2, False)


def test_a_core_can_be_said_to_be_other_than_known(tmp_path: Path) -> None:
    text = replaced("count = 4", "count = 4\nfma_per_cycle = 0.5")
    assert board_file.read(write(tmp_path, text)).spec.fma_per_cycle == 0.5


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('model = "My board"', "", "model is missing; it takes one line of text"),
        ('"My board"', '""', "model takes one line of text, got ''"),
        ('"My board"', "7", "model takes one line of text, got 7"),
        ('model = "My board"', 'modell = "x"', r"no field 'modell'; did you mean model\?"),
        ('model = "My board"', 'zzz = "x"', "no field 'zzz'; there are model, triple"),
        ("aarch64-linux-gnu", "aarch64-windows", "triple takes one of aarch64-linux-gnu, .*got"),
        ('"dotprod"', '"avx2"', "features takes a list of dotprod, fp16, sve, got"),
        ('["dotprod"]', '"dotprod"', "features takes a list"),
        ("aarch64-linux-gnu", "armv7l-linux-gnueabihf", "features are those of 64-bit cores"),
        ("[[cores]]", "[cores]", r"cores takes one or more tables \(\[\[cores\]\]\)"),
        ("[[cores]]", "[[core]]", r"no field 'core'; did you mean cores\?"),
        ("cortex-a55", "cortex-a5x", "cores 1: LLVM has no mcpu 'cortex-a5x' for .*cortex-a5"),
        ("cortex-a55", "cortex-a7", "LLVM has no mcpu 'cortex-a7' for aarch64-linux-gnu"),
        ("cortex-a55", "znver3", "LLVM has no mcpu 'znver3' for .*; it has cortex-a53"),
        ("count = 4", "count = 0", "cores 1: count takes a whole number from 1 to 1024, got 0"),
        ("count = 4", "count = true", "count takes a whole number"),
        ("count = 4", "", "count is missing"),
        ("1.9", "1900", "clock_ghz takes a number above 0, at most 10, got 1900"),
        ("1.9", "nan", "clock_ghz takes a number"),
        ("1.9", '"fast"', "clock_ghz takes a number"),
        ("l2_kib = 128", "l2_kib = 0", "l2_kib takes a whole number from 1"),
        ("count = 4", 'count = 4\nout_of_order = "no"', "out_of_order takes true or false"),
        ("l2_kib", "l2_bytes", r"no field 'l2_bytes'; did you mean l2_kib\?"),
        ("triple =", "triple", "is no TOML: .*line 3"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, replaced(old, new))
    with pytest.raises(TargetError, match=problem) as error:
        board_file.read(path)
    assert str(error.value).startswith(str(path))


def test_the_fastest_cores_come_first(tmp_path: Path) -> None:
    faster = GOOD[GOOD.index("[[cores]]") :].replace("cortex-a55", "cortex-a76")
    with pytest.raises(TargetError, match="put the fastest cores first"):
        board_file.read(write(tmp_path, GOOD + faster))


@pytest.mark.parametrize("name", ["rpi4.toml", "host.toml"])
def test_a_name_that_is_taken(name: str, folder: Path) -> None:
    path = write(folder, name=name)
    with pytest.raises(TargetError, match="is a target already; give the file another name"):
        registry.get(str(path))


@pytest.mark.parametrize("name", ["rpi4", "host"])
def test_a_taken_name_shows_in_the_list(name: str, folder: Path) -> None:
    path = write(folder, name=f"{name}.toml")
    assert registry.names()[-1] == str(path)
    assert registry.get("rpi4").device_model == "Raspberry Pi 4 (BCM2711)"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"can't read the target .*absent\.toml: No such file"):
        registry.get(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TargetError, match="can't read the target"):
        registry.get(str(tmp_path / "folder.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TargetError, match="is no text in UTF-8"):
        registry.get(str(tmp_path / "bytes.toml"))
    with pytest.raises(TargetError, match="the file's name is the target's"):
        registry.get(str(write(tmp_path, name="My Board.toml")))
