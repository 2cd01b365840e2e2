"""What the benchmarks share: bundles compiled and checked, engines in turns, figures, settings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.compiler import engines
from topiarist.compiler.bench import Ratio, ratio_interval, time_in_turns
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.engines import Engine
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.verify import verify

ROOT = Path(__file__).parents[2]
PACKAGES = ("topiarist", "apache-tvm", "onnxruntime", "openvino", "torch", "onnx", "numpy")

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Figure:
    """One line of the table: what is claimed, and what was measured with its 95 % interval.

    `least` and `aim` are the project's bars, None where it has none; `at_most` turns them round.
    """

    what: str
    least: float | None
    aim: float | None
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    at_most: bool = False


@dataclass(frozen=True)
class CaseResult:
    """The figures of a case, and all that they were taken from, as plain JSON values."""

    figures: tuple[Figure, ...]
    details: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A bundle, its model file, and what compiling and checking it said."""

    model: Path
    bundle: Path
    details: dict[str, Any]


def rivals() -> list[str]:
    """The engines to beat: ONNX Runtime, and OpenVINO where it is installed."""
    return ["ort"] + (["openvino"] if importlib.util.find_spec("openvino") else [])


def compiled(
    name: str,
    model: onnx.ModelProto,
    folder: Path,
    *,
    threads: int = 1,
    options: Sequence[str] = (),
) -> Compiled:
    """Compile a model and compare its outputs with ONNX Runtime's. Raises RuntimeError if wrong.

    `options` are further ones of the command line.
    """
    source, bundle = folder / f"{name}.onnx", folder / f"{name}.topi"
    onnx.save(model, source)
    report, seconds = _compile(source, bundle, ("--threads", str(threads), *options))
    checked = verify(bundle, source)
    if not checked.passed:
        raise RuntimeError(f"{name}: the outputs differ from ONNX Runtime's by {checked.max_rel}")
    details = {
        "verify": checked.to_json(),
        "compile_s": seconds,
        "model_bytes": source.stat().st_size,
        "bundle_bytes": report["bytes"],
        "layers": report["layers"],
    }
    return Compiled(source, bundle, details)


def _compile(source: Path, bundle: Path, options: Sequence[str]) -> tuple[dict[str, Any], float]:
    """The compiler's report and seconds, in a process of its own: nothing else's threads."""
    start = time.perf_counter()
    command = (sys.executable, "-m", "topiarist.compiler.cli", "compile", "--json")
    done = subprocess.run(
        (*command, str(source), "-o", str(bundle), *options),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout), time.perf_counter() - start


def bundle_engine(name: str, bundle: Path, feeds: Feeds, threads: int = 1) -> Engine:
    """A bundle to time, under a name of its own."""
    return replace(engines.open_bundle(bundle, feeds, threads), name=name)


def feeds_of(bundle: Path) -> Feeds:
    """Random inputs of a bundle."""
    return random_inputs(read_manifest(bundle).inputs)


def in_turns(contestants: Sequence[Engine], seconds: float) -> dict[str, list[float]]:
    """Seconds of one inference by engine, one value a round."""
    return time_in_turns(
        contestants, seconds=seconds, rounds=None, clock=time.perf_counter, sleep=time.sleep
    )


def over_best(samples: dict[str, list[float]], ours: str, others: Sequence[str]) -> Ratio:
    """The time of the other that is fastest in this run, over ours."""
    best = min(others, key=lambda name: float(np.median(samples[name])))
    return ratio_interval(samples[best], samples[ours])


def geomean(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean; its interval is that of the intervals' ends, wider than 95 %."""

    def mean(values: Sequence[float]) -> float:
        return math.exp(sum(math.log(v) for v in values) / len(values))

    ends = [(r.median, r.low, r.high) for r in ratios]
    return Ratio(*(mean(values) for values in zip(*ends, strict=True)))


def figure(what: str, least: float | None, aim: float | None, ratio: Ratio) -> Figure:
    """A ratio as a line of the table."""
    return Figure(what, least, aim, ratio.median, ratio.low, ratio.high)


def summary(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds by engine."""
    return {
        name: {
            f"{what}_ms": 1e3 * float(np.percentile(values, percentile))
            for what, percentile in (("median", 50), ("p10", 10), ("p90", 90))
        }
        | {"rounds": len(values)}
        for name, values in samples.items()
    }


def setting() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    """The processor as Linux calls it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    """Versions of what is installed of the packages that matter."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _git(*command: str) -> str:
    """A git command's output, "" outside a repository."""
    done = subprocess.run(("git", *command), cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
