"""What the benchmark scripts share: one case measured, one JSON file, one table."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from topiarist.compiler.bench import bench
from topiarist.compiler.verify import verify

ROOT = Path(__file__).parents[2]
PACKAGES = ("topiarist", "apache-tvm", "onnxruntime", "openvino", "onnx", "numpy")
Case = tuple[str, Callable[[], onnx.ModelProto]]


def options(description: str) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=20.0, help="timing per case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", default="ort", help="comma-separated, as in topiarist bench")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def run(question: str, cases: list[Case], opts: argparse.Namespace) -> None:
    """Measure all cases, show them, and write the JSON."""
    console = Console()
    results = []
    for name, make in cases:
        with console.status(f"{name}: compile, verify, time"), tempfile.TemporaryDirectory() as tmp:
            results.append({"case": name, **_measure(make(), Path(tmp), opts)})
    console.print(_table(question, results))
    if opts.json:
        opts.json.write_text(json.dumps({"question": question, **setting(), "cases": results}))
        console.print(f"Written to {opts.json}.")


def _measure(model: onnx.ModelProto, folder: Path, opts: argparse.Namespace) -> dict[str, Any]:
    """Compile one model, compare its outputs, time it and the others interleaved."""
    source, bundle = folder / "model.onnx", folder / "model.topi"
    onnx.save(model, source)
    compile_s = _compile(source, bundle, opts.threads)
    against = opts.against.split(",")
    timed = bench(bundle, source, against, threads=opts.threads, seconds=opts.seconds)
    return {
        **timed.to_json(),
        "verify": verify(bundle, source).to_json(),
        "compile_s": compile_s,
        "model_bytes": source.stat().st_size,
        "bundle_bytes": sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file()),
    }


def _compile(source: Path, bundle: Path, threads: int) -> float:
    """Seconds of a compilation in a process of its own: it binds itself to a core."""
    start = time.perf_counter()
    command = (sys.executable, "-m", "topiarist.compiler.cli", "compile", "--json")
    subprocess.run(
        (*command, str(source), "-o", str(bundle), "--threads", str(threads)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


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


def _table(question: str, results: list[dict[str, Any]]) -> Table:
    """Median and spread per case and engine."""
    table = Table("case", "engine", "median ms", "10 % - 90 %", "ours faster by", title=question)
    for result in results:
        for name, timing in result["engines"].items():
            ratio = result["ratio"].get(name)
            gain = (
                f"{ratio['median']:.2f}x ({ratio['low']:.2f} - {ratio['high']:.2f})"
                if ratio
                else ""
            )
            spread = f"{timing['p10_ms']:.2f} - {timing['p90_ms']:.2f}"
            table.add_row(result["case"], name, f"{timing['median_ms']:.2f}", spread, gain)
    return table
