"""All of the project's figures on x86, in one table with machine, versions and commit.

    python -m tests.benchmarks.bench_x86 [--only resnet50,layers] [--seconds 20] [--out FOLDER]

Each case writes FOLDER/<case>.json; a case that has its file is not measured again (--again does),
so a run may be cut off and go on later. A case takes minutes: networks are compiled by timing
kernels. Let nothing else run meanwhile.

One thread, batch 1, fp32. "Over the best" is the time of ONNX Runtime or OpenVINO, whichever is
faster in that run, over ours; all engines take turns within one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.cases import CASES
from topiarist.errors import TopiaristError

FOLDER = measure.ROOT / "build" / "benchmarks" / "x86"
WIDTH = 150  # columns of the table


def main() -> None:
    """Measure what isn't there yet, and show everything that is."""
    opts = _options()
    console = Console(width=WIDTH)
    opts.out.mkdir(parents=True, exist_ok=True)
    for name in opts.only:
        path = opts.out / f"{name}.json"
        if path.is_file() and not opts.again:
            console.print(f"{name}: measured before, in {path}")
            continue
        with console.status(f"{name}: compile, verify, time"):
            result = _measure(name, opts.seconds, console)
        if result is not None:
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    found = [opts.out / f"{name}.json" for name in CASES]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.is_file()]
    if results:
        console.print(table(results))
        if opts.json:
            opts.json.write_text(json.dumps({"question": __doc__, "cases": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_x86")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", type=_names, default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing per network")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the cases' results")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--json", type=Path, help="write all results here")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {unknown[0]!r}")
    return names


def _measure(name: str, seconds: float, console: Console) -> dict[str, Any] | None:
    """The result of a case in a process of its own, None if that failed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measured, name, seconds).result()
        except (TopiaristError, RuntimeError, BrokenProcessPool) as error:
            console.print(f"{name}: failed: {error}", markup=False)
            return None


def measured(name: str, seconds: float) -> dict[str, Any]:
    """A case measured here, as plain JSON values."""
    result = CASES[name](seconds)
    return {
        "case": name,
        "seconds": seconds,
        "against": measure.rivals(),
        **measure.setting(),
        **asdict(result),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """One line a figure."""
    settings = {(r["machine"]["cpu"], r["commit"][:12], tuple(r["against"])) for r in results}
    title = "\n".join(
        f"{cpu}, commit {commit}, against {' and '.join(against)}"
        for cpu, commit, against in sorted(settings)
    )
    shown = Table("case", "at least", "aim", "measured (95 % interval)", "", title=title)
    for result in results:
        for figure in result["figures"]:
            bars = [_bar(figure, key) for key in ("least", "aim")]
            shown.add_row(figure["what"], *bars, _value(figure), _verdict(figure))
        shown.add_section()
    return shown


def _bar(figure: dict[str, Any], key: str) -> str:
    if figure[key] is None:
        return ""
    return f"{'at most ' if figure['at_most'] else ''}{figure[key]:g}{figure['unit']}"


def _value(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "not measured"
    text = f"{figure['value']:.2f}{figure['unit']}"
    if figure["low"] is None:
        return text
    return f"{text} ({figure['low']:.2f} - {figure['high']:.2f})"


def _verdict(figure: dict[str, Any]) -> str:
    """Which bar the measured value reaches."""
    value, sign = figure["value"], -1 if figure["at_most"] else 1
    reached = [
        name
        for name, key in (("at least", "least"), ("aim", "aim"))
        if value is not None and figure[key] is not None and sign * (value - figure[key]) >= 0
    ]
    if figure["least"] is None or value is None:
        return ""
    return reached[-1] if reached else "below"


if __name__ == "__main__":
    main()
