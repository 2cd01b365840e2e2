"""Sessions: results, checks of what is passed in, batches, threads, and a light start."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from topiarist.compiler import runtime
from topiarist.compiler.bundle import write_bundle
from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.session import Session
from topiarist.errors import BundleError


@pytest.fixture
def weight(tiny_model: CompiledModel) -> np.ndarray:
    return tiny_model.params[0]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)


def test_run(tiny_bundle: Path, x: np.ndarray, weight: np.ndarray) -> None:
    session = Session(tiny_bundle)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, x * weight)
    (named,) = session.run(["y"], {"x": x})
    np.testing.assert_array_equal(named, y)


def test_several_outputs(
    twin_model: CompiledModel, tmp_path: Path, x: np.ndarray, weight: np.ndarray
) -> None:
    session = Session(write_bundle(twin_model, tmp_path / "twin.topi"))
    for result in session.run(None, {"x": np.vstack([x, x])}):
        np.testing.assert_array_equal(result, np.vstack([x, x]) * np.vstack([weight, weight]))
    assert len(session.run(["z"], {"x": x})) == 1


def test_results_are_not_overwritten(tiny_bundle: Path, x: np.ndarray, weight: np.ndarray) -> None:
    session = Session(tiny_bundle)
    (first,) = session.run(None, {"x": x})
    session.run(None, {"x": -x})
    np.testing.assert_array_equal(first, x * weight)


def test_any_memory_layout(tiny_bundle: Path, x: np.ndarray, weight: np.ndarray) -> None:
    session = Session(tiny_bundle)
    unaligned = np.frombuffer(b"\0" * 4 + x.tobytes(), np.float32, offset=4).reshape(2, 16)
    strided = np.repeat(x, 3, axis=1)[:, ::3]
    for array in (unaligned, np.asfortranarray(x), strided):
        np.testing.assert_array_equal(session.run(None, {"x": array})[0], x * weight)


def test_batches_run_in_chunks(tiny_bundle: Path, weight: np.ndarray) -> None:
    x = np.arange(6 * 16, dtype=np.float32).reshape(6, 16)
    (y,) = Session(tiny_bundle).run(None, {"x": x})
    np.testing.assert_array_equal(y, x * np.tile(weight, (3, 1)))


def test_signatures(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle)
    (node,) = session.get_inputs()
    assert (node.name, node.shape, node.type) == ("x", [2, 16], "tensor(float)")
    assert [n.name for n in session.get_outputs()] == ["y"]
    assert [s.name for s in session.inputs + session.outputs] == ["x", "y"]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 16), "float64", r"dtype float64; expected float32 \[2, 16\]"),
        ((3, 16), "float32", r"\[3, 16\]; expected \[2, 16\] \(or a multiple of 2"),
        ((0, 16), "float32", r"\[0, 16\]"),
        ((2, 17), "float32", r"\[2, 17\]"),
        ((32,), "float32", r"\[32\]"),
        ((), "float32", r"\[\]"),
    ],
)
def test_wrong_arrays(tiny_bundle: Path, shape: tuple[int, ...], dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Session(tiny_bundle).run(None, {"x": np.zeros(shape, dtype)})


def test_wrong_names(tiny_bundle: Path, x: np.ndarray) -> None:
    session = Session(tiny_bundle)
    with pytest.raises(ValueError, match="no input named 'z'; expected x: float32"):
        session.run(None, {"z": x})
    with pytest.raises(ValueError, match="'x' is missing"):
        session.run(None, {})
    with pytest.raises(ValueError, match="no output named 'z'; the outputs are y"):
        session.run(["z"], {"x": x})


def test_threads(tiny_bundle: Path, x: np.ndarray, weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="got 0"):
        Session(tiny_bundle, threads=0)
    one, two = Session(tiny_bundle), Session(tiny_bundle, threads=2)
    assert (one.threads, two.threads) == (1, 2)
    for session in (one, two, one, two):
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x * weight)


def test_the_pool_has_the_threads_asked_for() -> None:
    count = runtime.load().get_global_func("runtime.NumThreads")
    pools = [runtime.ThreadPool(n) for n in (1, 2, 3, 1)]
    assert [pool.call(count) for pool in pools] == [1, 2, 3, 1]


def test_one_session_in_several_threads(tiny_bundle: Path, weight: np.ndarray) -> None:
    session = Session(tiny_bundle)
    inputs = [np.full((2, 16), i, np.float32) for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: session.run(None, {"x": x})[0], inputs))
    for x, y in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(y, x * weight)


def test_a_bundle_compiled_again_is_loaded_anew(
    tiny_model: CompiledModel, tiny_bundle: Path, x: np.ndarray, weight: np.ndarray
) -> None:
    old = Session(tiny_bundle)
    doubled = dataclasses.replace(tiny_model, params=(2 * tiny_model.params[0],))
    write_bundle(doubled, tiny_bundle)
    new = Session(tiny_bundle)
    np.testing.assert_array_equal(old.run(None, {"x": x})[0], x * weight)
    np.testing.assert_array_equal(new.run(None, {"x": x})[0], x * (2 * weight))


def test_a_library_without_a_network(
    tiny_model: CompiledModel, tmp_path: Path, tiny_bundle: Path
) -> None:
    class Text:
        def export_library(self, path: str) -> None:
            Path(path).write_text("no ELF")

    path = write_bundle(dataclasses.replace(tiny_model, executable=Text()), tmp_path / "t.topi")
    with pytest.raises(BundleError, match="can't be loaded"):
        Session(path)


RUN_ELSEWHERE = """
import os, sys
from topiarist.compiler.session import Session
import numpy as np
affinity = os.sched_getaffinity(0)
session = Session(sys.argv[1])
y = session.run(None, {"x": np.ones((2, 16), np.float32)})[0]
assert "tvm" not in sys.modules
assert os.sched_getaffinity(0) == affinity
assert abs(y.sum()) < 1e-5, y
"""


def test_runs_without_tvm_and_without_a_word(tiny_bundle: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN_ELSEWHERE, "tiny.topi"],
        cwd=tiny_bundle.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_session_refuses_altered_weights(tiny_bundle: Path) -> None:
    data = bytearray((tiny_bundle / "weights.bin").read_bytes())
    data[17] ^= 1
    (tiny_bundle / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin was altered"):
        Session(tiny_bundle)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """Not by us, although tvm_ffi would; and it can be imported afterwards."""
    (tmp_path / "torch.py").write_text("print('torch is imported')")
    program = (
        "import sys; from topiarist.compiler import runtime; runtime.load(); "
        "print('torch' in sys.modules); import torch"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False", "torch is imported"]
