"""Inference engines behind one face, to be timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.session import Session
from topiarist.errors import ModelError, TopiaristError

Array = NDArray[Any]
OURS = "topiarist"


@dataclass(frozen=True)
class Engine:
    """Something to time: `run()` is one inference on inputs that it holds.

    `gpu_seconds()` is what a GPU needs for it, without the way there and back; None without one.
    """

    name: str
    threads: int
    version: str
    run: Callable[[], object]
    gpu_seconds: Callable[[], float | None] = lambda: None


def check_names(names: list[str]) -> None:
    """ValueError for an engine that isn't known."""
    for name in names:
        if name not in _OTHERS:
            raise ValueError(f"no engine {name!r} to compare with; known: {', '.join(_OTHERS)}")


def open_bundle(bundle: Path, feeds: Mapping[str, Array], threads: int) -> Engine:
    """The bundle as an engine."""
    session = Session(bundle, threads=threads)
    version = session.manifest.versions.get("topiarist", "none")
    return Engine(OURS, threads, version, lambda: session.run(None, feeds), session.gpu_seconds)


def open_engine(name: str, model: Path, feeds: Mapping[str, Array], threads: int) -> Engine:
    """Another engine on an ONNX model. Raises ValueError for an unknown name."""
    check_names([name])
    return _OTHERS[name](model, feeds, threads)


def onnxruntime_session(model: Path, threads: int = 0) -> Any:
    """An ONNX Runtime CPU session, graph optimisations on; 0 threads leaves the number to it."""
    import onnxruntime as ort

    if not model.is_file():
        raise ModelError(f"there is no model {model}")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common root
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"ONNX Runtime can't load {model}: {reason}") from error


def _open_onnxruntime(model: Path, feeds: Mapping[str, Array], threads: int) -> Engine:
    import onnxruntime as ort

    session = onnxruntime_session(model, threads)
    _check_shapes(model, {i.name: i.shape for i in session.get_inputs()}, feeds)
    arrays = dict(feeds)
    return Engine("ort", threads, str(ort.__version__), lambda: session.run(None, arrays))


def _open_openvino(model: Path, feeds: Mapping[str, Array], threads: int) -> Engine:
    try:
        import openvino
    except ImportError as error:
        raise TopiaristError("OpenVINO isn't installed: `pip install topiarist[bench]`") from error
    try:
        network = openvino.Core().read_model(str(model))
        network.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = openvino.compile_model(network, "CPU", _openvino_options(threads))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"OpenVINO can't load {model}: {reason}") from error
    request = compiled.create_infer_request()
    # Shared tensors: no copies that the others don't make.
    tensors = {name: openvino.Tensor(np.ascontiguousarray(a)) for name, a in feeds.items()}
    return Engine("openvino", threads, str(openvino.__version__), lambda: request.infer(tensors))


def _openvino_options(threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16, as it would choose where there is AMX
        "ENABLE_CPU_PINNING": False,  # it would pin the thread that the others run on
    }


def _check_shapes(model: Path, shapes: dict[str, list[Any]], feeds: Mapping[str, Array]) -> None:
    """ModelError unless the model takes arrays of these shapes."""
    for name, array in feeds.items():
        expected = shapes.get(name)
        if (
            expected is None
            or len(expected) != array.ndim
            or any(
                isinstance(e, int) and e != n for e, n in zip(expected, array.shape, strict=True)
            )
        ):
            raise ModelError(
                f"{model} takes {name}: {expected} and the bundle {list(array.shape)}; compile "
                "with the model's batch to compare them"
            )


_OTHERS: dict[str, Callable[[Path, Mapping[str, Array], int], Engine]] = {
    "ort": _open_onnxruntime,
    "openvino": _open_openvino,
}
