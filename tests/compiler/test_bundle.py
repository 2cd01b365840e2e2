"""Bundles: written whole or not at all, and refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topiarist.compiler import bundle as bundles
from topiarist.compiler.bundle import OpenBundle, check_writable, read_manifest, write_bundle
from topiarist.compiler.compiled import CompiledModel
from topiarist.errors import BuildError, BundleError, ModelError, OutputError
from topiarist.targets import registry

Edit = Callable[..., None]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Failing:
    """An executable whose export writes something and then fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def export_library(self, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise self.error


def failing(model: CompiledModel, error: BaseException) -> CompiledModel:
    return dataclasses.replace(model, executable=Failing(error))


def test_round_trip(tiny_model: CompiledModel, tiny_bundle: Path, tiny_onnx: Path) -> None:
    assert names(tiny_bundle) == ["lib.so", "manifest.json", "weights.bin"]
    manifest = OpenBundle(tiny_bundle).checked()
    assert (manifest.inputs, manifest.outputs) == (tiny_model.inputs, tiny_model.outputs)
    assert (manifest.target, manifest.threads) == (tiny_model.target, 1)
    assert manifest.layers[0].config == {"tile": 4, "order": [1, 2]}
    assert manifest.layers == tuple(
        dataclasses.replace(layer, config={"tile": 4, "order": [1, 2]})
        for layer in tiny_model.layers
    )
    assert manifest.source is not None
    assert (manifest.source.name, manifest.source.path) == ("tiny.onnx", str(tiny_onnx))
    assert manifest.source.sha256 == bundles.hash_file(tiny_onnx)


def test_weights_are_aligned(tiny_model: CompiledModel, tmp_path: Path) -> None:
    params = (np.ones(3, np.float32), np.arange(5, dtype=np.int32), np.ones((2, 2), np.float32).T)
    model = dataclasses.replace(tiny_model, params=params)
    path = write_bundle(model, tmp_path / "m.topi")
    entries = read_manifest(path).params
    assert [e.offset for e in entries] == [0, 64, 128]
    data = (path / "weights.bin").read_bytes()
    for entry, array in zip(entries, params, strict=True):
        stored = data[entry.offset : entry.offset + entry.nbytes]
        np.testing.assert_array_equal(
            np.frombuffer(stored, entry.dtype).reshape(entry.shape), array
        )


def test_replaces_a_bundle(tiny_model: CompiledModel, tiny_bundle: Path) -> None:
    before = names(tiny_bundle.parent)
    write_bundle(dataclasses.replace(tiny_model, threads=2), tiny_bundle)
    assert OpenBundle(tiny_bundle).checked().threads == 2
    assert names(tiny_bundle.parent) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_bundle(
    tiny_model: CompiledModel, tiny_bundle: Path, error: BaseException
) -> None:
    before = names(tiny_bundle.parent)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_bundle(failing(tiny_model, error), tiny_bundle)
    assert names(tiny_bundle.parent) == before
    OpenBundle(tiny_bundle).checked()


def test_a_failure_leaves_nothing(tiny_model: CompiledModel, tmp_path: Path) -> None:
    model = failing(tiny_model, RuntimeError("ld: cannot find it"))
    with pytest.raises(BuildError, match="cannot find it"):
        write_bundle(model, tmp_path / "m.topi")
    assert names(tmp_path) == []


def test_a_failed_rename_brings_the_old_bundle_back(
    tiny_model: CompiledModel, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OutputError, match="Permission denied"):
        write_bundle(tiny_model, tiny_bundle)
    OpenBundle(tiny_bundle).checked()
    assert not [n for n in names(tiny_bundle.parent) if n.startswith(".")]


def test_no_linker(
    tiny_model: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(BuildError, match="install gcc"):
        write_bundle(tiny_model, tmp_path / "m.topi")
    assert names(tmp_path) == []


def test_no_source_model(tiny_model: CompiledModel, tmp_path: Path) -> None:
    assert read_manifest(write_bundle(tiny_model, tmp_path / "m.topi")).source is None
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        write_bundle(tiny_model, tmp_path / "n.topi", source=tmp_path / "absent.onnx")


def test_check_writable_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="no bundle"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="doesn't exist"):
        check_writable(tmp_path / "absent" / "m.topi")


def test_check_writable_leaves_no_trace(tmp_path: Path, tiny_bundle: Path) -> None:
    before = names(tmp_path)
    assert check_writable(tmp_path / "new.topi") == tmp_path / "new.topi"
    assert check_writable(tiny_bundle) == tiny_bundle
    assert names(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_needs_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "m.topi")


def test_a_bundle_with_more_in_it_is_not_replaced(
    tiny_model: CompiledModel, tiny_bundle: Path
) -> None:
    (tiny_bundle / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="no bundle"):
        write_bundle(tiny_model, tiny_bundle)
    assert (tiny_bundle / "notes.txt").exists()


def test_absent_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="doesn't exist"):
        OpenBundle(tmp_path / "m.topi").checked()
    with pytest.raises(BundleError, match=r"manifest\.json can't be read"):
        OpenBundle(tmp_path).checked()


@pytest.mark.parametrize("name", ["lib.so", "weights.bin"])
def test_missing_file(tiny_bundle: Path, name: str) -> None:
    (tiny_bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} can't be read.*compile the model again"):
        OpenBundle(tiny_bundle).checked()


@pytest.mark.parametrize("name", ["lib.so", "weights.bin"])
def test_altered_file(tiny_bundle: Path, name: str) -> None:
    data = bytearray((tiny_bundle / name).read_bytes())
    data[17] ^= 1
    (tiny_bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        OpenBundle(tiny_bundle).checked()
    (tiny_bundle / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes"):
        OpenBundle(tiny_bundle).checked()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"format": "other"}', "[" * 100_000])
def test_manifest_that_is_none(tiny_bundle: Path, text: str) -> None:
    (tiny_bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        OpenBundle(tiny_bundle).checked()


def test_altered_manifest(tiny_bundle: Path) -> None:
    path = tiny_bundle / "manifest.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 9'))
    with pytest.raises(BundleError, match="altered"):
        OpenBundle(tiny_bundle).checked()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"target": {"name": "x"}}, "damaged"),
        ({"inputs": 3}, "damaged"),
        ({"files": {}}, "altered"),
        ({"versions": {}}, "compiled with apache-tvm none"),
        ({"versions": {"apache-tvm": "0.26.0"}}, r"0\.26\.0.*install apache-tvm==0\.26\.0"),
    ],
)
def test_manifest_of_another_kind(
    tiny_bundle: Path, edit_manifest: Edit, changes: dict[str, Any], message: str
) -> None:
    edit_manifest(tiny_bundle, **changes)
    with pytest.raises(BundleError, match=message):
        OpenBundle(tiny_bundle).checked()


def test_a_post_release_of_tvm_fits(tiny_bundle: Path, edit_manifest: Edit) -> None:
    versions = json.loads((tiny_bundle / "manifest.json").read_text())["versions"]
    release = ".".join(versions["apache-tvm"].split(".")[:3])
    edit_manifest(tiny_bundle, versions={**versions, "apache-tvm": f"{release}.post99"})
    OpenBundle(tiny_bundle).checked()


def test_a_cpu_without_the_instructions(tiny_bundle: Path, edit_manifest: Edit) -> None:
    target = {**registry.get("x86-avx2").to_json(), "required_features": ["avx1024"]}
    edit_manifest(tiny_bundle, target=target)
    with pytest.raises(BundleError, match=r"lacks avx1024.*--target host"):
        OpenBundle(tiny_bundle).checked()
