"""Verification: what counts as equal, and on which inputs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from topiarist.compiler.bundle import write_bundle
from topiarist.compiler.compiled import CompiledModel, TensorSignature
from topiarist.compiler.input_data import load_inputs, random_inputs
from topiarist.compiler.verify import compare, verify
from topiarist.errors import ModelError

SCORES = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], np.float32)


def compare_one(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4):  # type: ignore[no-untyped-def]
    return compare([ours], [theirs], samples=len(ours), tolerance=tolerance)


def test_a_right_bundle_passes(tiny_bundle: Path, tiny_onnx: Path) -> None:
    result = verify(tiny_bundle, tiny_onnx)
    assert result.passed and result.max_rel < 1e-6
    assert (result.samples, result.top1_agreement) == (8, 1.0)


def test_a_wrong_bundle_fails(tiny_model: CompiledModel, tiny_onnx: Path, tmp_path: Path) -> None:
    wrong = dataclasses.replace(tiny_model, params=(tiny_model.params[0] * np.float32(1.01),))
    result = verify(write_bundle(wrong, tmp_path / "wrong.topi"), tiny_onnx)
    assert not result.passed
    assert result.max_rel == pytest.approx(0.01, rel=1e-3)


def test_given_inputs(tiny_bundle: Path, tiny_onnx: Path) -> None:
    result = verify(tiny_bundle, tiny_onnx, {"x": np.ones((4, 16), np.float32)})
    assert result.passed and result.samples == 4
    with pytest.raises(ValueError, match="dtype uint8; expected float32"):
        verify(tiny_bundle, tiny_onnx, {"x": np.ones((4, 16), np.uint8)})


def test_a_model_with_an_open_batch(tiny_bundle: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.node[0].CopyFrom(helper.make_node("Mul", ["x", "row"], ["y"]))
    row = helper.make_tensor("row", TensorProto.FLOAT, [1], [2.0])
    model.graph.initializer.append(row)
    path = tmp_path / "open.onnx"
    onnx.save(model, path)
    assert not verify(tiny_bundle, path).passed


def test_another_model(tiny_bundle: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="other inputs or outputs"):
        verify(tiny_bundle, tmp_path / "other.onnx")


def test_absent_and_broken_models(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model"):
        verify(tiny_bundle, tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="can't load"):
        verify(tiny_bundle, tmp_path / "broken.onnx")


def test_differences_are_relative_to_the_range() -> None:
    result = compare_one(SCORES + np.float32(0.03), SCORES)
    assert result.max_abs == pytest.approx(0.03, rel=1e-4)
    assert result.max_rel == pytest.approx(0.01, rel=1e-4)
    assert not result.passed
    assert compare_one(SCORES + np.float32(0.03), SCORES, tolerance=0.02).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
def test_not_finite_never_passes(bad: float, side: str) -> None:
    broken = np.where(SCORES == 2, np.float32(bad), SCORES)
    ours = broken if side != "theirs" else SCORES
    theirs = broken if side != "ours" else SCORES
    result = compare_one(ours, theirs, tolerance=math.inf)
    assert not result.passed
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["max_abs"] is None


def test_zero_references() -> None:
    zeros = np.zeros_like(SCORES)
    assert compare_one(zeros, zeros).max_rel == 0.0
    assert not compare_one(SCORES, zeros).passed


def test_top1_agreement() -> None:
    assert compare_one(SCORES, SCORES[:, ::-1]).top1_agreement == 0.0
    assert compare_one(SCORES, SCORES[[0, 0]]).top1_agreement == 0.5
    assert compare_one(SCORES[None], SCORES[None]).top1_agreement is None
    maps = SCORES[:, :, None, None]  # as of a network that ends in a global pool
    assert compare_one(maps, maps[[0, 0]]).top1_agreement == 0.5


def test_shapes_must_agree() -> None:
    with pytest.raises(ModelError, match="another model"):
        compare_one(SCORES, SCORES[:1])


INPUTS = (TensorSignature("a", (2, 3), "float32"), TensorSignature("b", (2,), "int64"))


def test_inputs_by_name(tmp_path: Path) -> None:
    arrays = {"a": np.ones((2, 3)), "b": np.ones(2), "labels": np.ones(2)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert set(load_inputs(tmp_path / "x.npz", INPUTS)) == {"a", "b"}
    with pytest.raises(ValueError, match="no array named 'c', only a, b, labels"):
        load_inputs(tmp_path / "x.npz", (TensorSignature("c", (1,), "float32"),))


def test_a_single_array_of_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.ones(3))
    assert list(load_inputs(tmp_path / "x.npz", INPUTS[:1])) == ["a"]


@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x93NUMPY"])
def test_files_that_are_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz is no \.npz file"):
        load_inputs(tmp_path / "x.npz", INPUTS)


def test_pickles_and_single_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"an": "object"}]))
    np.save(tmp_path / "y.npy", np.ones(3))
    for name in ("x.npz", "y.npy"):
        with pytest.raises(ValueError, match=r"no \.npz file"):
            load_inputs(tmp_path / name, INPUTS[:1])


def test_random_inputs_are_the_same_each_time() -> None:
    first, second = random_inputs(INPUTS, chunks=3), random_inputs(INPUTS, chunks=3)
    assert {n: (a.shape, a.dtype.name) for n, a in first.items()} == {
        "a": ((6, 3), "float32"),
        "b": ((6,), "int64"),
    }
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
