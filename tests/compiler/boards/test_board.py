"""What a board says of itself, and which of its cores it picks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from topiarist.compiler.boards.board import PROTOCOL, Board, pick_cores, ranges
from topiarist.compiler.boards.server import describe_board, refusal
from topiarist.compiler.boards.session import check_versions
from topiarist.compiler.boards.tracker import parse_address
from topiarist.compiler.runtime import versions
from topiarist.errors import BoardError
from topiarist.targets.linux import Sources

A53, A72 = "0xd03", "0xd08"


def machine(folder: Path, *parts: str) -> Sources:
    """A processor of cores with these part numbers; the clocks of A72 are higher."""
    text = "".join(
        f"processor\t: {i}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n"
        for i, part in enumerate(parts)
    )
    (folder / "cpuinfo").write_text(text)
    for i, part in enumerate(parts):
        clock = folder / f"cpu{i}" / "cpufreq"
        clock.mkdir(parents=True)
        (clock / "cpuinfo_max_freq").write_text("1800000" if part == A72 else "1400000")
    return Sources(cpuinfo=folder / "cpuinfo", cpus=folder)


@pytest.mark.parametrize(
    ("wanted", "numbers", "name"),
    [
        ("big", (4, 5), "cortex-a72 4-5"),
        ("little", (0, 1, 2, 3), "cortex-a53 0-3"),
        ("all", (0, 1, 2, 3, 4, 5), "cortex-a72+cortex-a53 0-5"),
        ("4", (4,), "cortex-a72 4"),
        ("0-1,3", (0, 1, 3), "cortex-a53 0-1,3"),
        ("3-4", (3, 4), "cortex-a72+cortex-a53 3-4"),
    ],
)
def test_big_and_little_cores(
    tmp_path: Path, wanted: str, numbers: tuple[int, ...], name: str
) -> None:
    sources = machine(tmp_path, *[A53] * 4, *[A72] * 2)
    cores = pick_cores(wanted, sources, range(6))
    assert (cores.numbers, cores.name) == (numbers, name)


def test_cores_that_are_all_alike(tmp_path: Path) -> None:
    four = machine(tmp_path, *[A72] * 4)
    assert [pick_cores(w, four, range(4)).name for w in ("big", "little", "all")] == [
        "cortex-a72 0-3"
    ] * 3


def test_cores_of_an_unknown_kind(tmp_path: Path) -> None:
    """Where nobody picked any, records say nothing of cores."""
    sources = machine(tmp_path, "0x1", "0x1")
    assert pick_cores("all", sources, range(2)).name == ""
    assert pick_cores("1", sources, range(2)).name == "generic 1"


@pytest.mark.parametrize("wanted", ["", "fast", "1-", "0x1", "-1", "1,,2", "3-2"])
def test_cores_that_make_no_sense(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(BoardError, match="--cores"):
        pick_cores(wanted, machine(tmp_path, A72), [0])


def test_cores_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match=r"no core 4, 5 to use; there are 0-1,3"):
        pick_cores("3-5", machine(tmp_path, *[A72] * 4), [0, 1, 3])


def test_ranges() -> None:
    assert ranges([3, 0, 1, 2, 5, 7, 8]) == "0-3,5,7-8"


def test_a_board_describes_itself(tmp_path: Path) -> None:
    board = describe_board(pick_cores("1", machine(tmp_path, A72, A72), [0, 1]))
    assert Board.from_text(board.to_text(), "a:1") == replace(board, address="a:1")
    assert board.versions == versions() and board.core_count == 1 and board.free_bytes > 0
    check_versions(board)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "1", '{"protocol": 1}', '{"protocol": 1, "x": 2}']
)
def test_a_description_that_is_none(text: str) -> None:
    with pytest.raises(BoardError, match="a:1 describes itself as"):
        Board.from_text(text, "a:1")


def test_a_board_of_another_protocol_or_version() -> None:
    text = json.dumps({"protocol": PROTOCOL + 1, "more": 1})
    with pytest.raises(BoardError, match="install the same version on both"):
        Board.from_text(text, "a:1")
    newer = {**versions(), "apache-tvm-ffi": "9.9"}
    board = Board(PROTOCOL, newer, "aarch64", "Some Board", "", 4, 1 << 30, "a:1")
    with pytest.raises(BoardError, match=r"a:1 has apache-tvm-ffi 9.9.*pip install apache-tvm-ffi"):
        check_versions(board)


def test_a_target_that_a_board_does_not_understand() -> None:
    assert "can't tell" in refusal("{}")


def test_addresses() -> None:
    assert parse_address("desk:9000") == ("desk", 9000)
    assert parse_address("10.0.0.5") == ("10.0.0.5", 9190)
    for wrong in ("", ":9190", "desk:", "desk:x", "desk:0", "desk:70000"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(wrong)
