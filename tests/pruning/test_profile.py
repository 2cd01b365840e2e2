"""Profiles: what is written is read, SPDY's are read, and wrong lines are named."""

import pytest

from topiarist.errors import ProfileError
from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.profile import read_profile, write_profile


def test_levels_as_people_write_them():
    assert str(Level("unstructured", 0.12)) == "unstructured 12 %"
    assert str(Level("2:4", 0.5)) == "2:4 50 %"
    assert str(DENSE) == "dense"


def test_what_is_written_is_read(tmp_path):
    levels = {
        "layer1.0/conv1": Level("unstructured", 0.12),
        "a layer with spaces": Level("2:4", 0.5),
        "kernels": Level("kernel4", 4 / 9),
        "few": Level("block4x1", 1e-5),
        "stem": DENSE,
    } | {f"level{i}": Level("unstructured", 0.9**i) for i in range(1, 45)}
    write_profile(tmp_path / "net.txt", levels)
    assert read_profile(tmp_path / "net.txt") == levels
    assert list(read_profile(tmp_path / "net.txt")) == list(levels)
    text = (tmp_path / "net.txt").read_text()
    assert text.startswith("0.88 layer1.0/conv1\n0.5,2:4 a layer with spaces\n")


def test_a_profile_of_spdy(tmp_path):
    (tmp_path / "rn18.txt").write_text("0.0000 layer1.0.conv1\n0.9375 layer1.0.conv2\n")
    expected = {"layer1.0.conv1": DENSE, "layer1.0.conv2": Level("unstructured", 0.0625)}
    assert read_profile(tmp_path / "rn18.txt") == expected


@pytest.mark.parametrize(
    "line",
    [
        "0.5",
        "conv1 0.5",
        "half conv1",
        "1 conv1",
        "-0.1 conv1",
        "nan conv1",
        "0.5, conv1",
        ",2:4 x",
    ],
)
def test_wrong_lines_are_named(tmp_path, line):
    (tmp_path / "net.txt").write_text(f"0.5 stem\n\n{line}\n")
    with pytest.raises(ProfileError, match=r"net\.txt, line 3: .* is not the share of zeros"):
        read_profile(tmp_path / "net.txt")


def test_a_layer_twice_and_no_file(tmp_path):
    (tmp_path / "net.txt").write_text("0.5 stem\n0.4 stem\n")
    with pytest.raises(ProfileError, match="line 2: the layer 'stem' has a line above"):
        read_profile(tmp_path / "net.txt")
    with pytest.raises(ProfileError, match="can't be read"):
        read_profile(tmp_path / "other.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="can't be read"):
        read_profile(tmp_path / "binary")


def test_layers_that_are_no_line(tmp_path):
    with pytest.raises(ValueError, match="can't be written"):
        write_profile(tmp_path / "net.txt", {"a\nb": DENSE})
