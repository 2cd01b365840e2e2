"""The page itself: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from topiarist.compiler.bench import BenchResult
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.compiled import Conditions
from topiarist.compiler.engines import OURS
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.output_file import check_output, write_file
from topiarist.compiler.report import pictures, texts
from topiarist.compiler.report.inputs import Predictions, Sweep, check_dense, read_bench
from topiarist.compiler.report.layers import FAMILIES, Row, comparable, rows_of
from topiarist.compiler.report.outlook import outlook

DISTURBED = 1.15  # the whole network over the sum of its parts, from which on one was disturbed
SHOWN = 12  # layers to prune next; the others are a click away
_ENGINES = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}
_TIMED: dict[Conditions, tuple[str, str, str]] = {  # in a sentence, and as heads of columns
    "alone": ("timed alone", "µs alone", "µs\u00a0dense, alone"),
    "in network": ("timed in the network", "", "µs\u00a0dense, in network"),
    "estimate": ("by estimate", "", "µs\u00a0dense, estimated"),
    "": ("timed alike", "µs, timed alike", "µs\u00a0dense, timed alike"),
}


@dataclass(frozen=True)
class Figure:
    """One of the figures at the top: what it is, and how it is known."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Details:
    """What is known besides the bundle itself."""

    dense: Manifest | None = None
    bench: BenchResult | None = None
    predictions: Predictions | None = None
    sweep: Sweep | None = None


def write_report(
    bundle: Path | str,
    output: Path | str,
    *,
    dense: Path | str | None = None,
    bench: Path | str | None = None,
    predictions: Predictions | None = None,
    sweep: Sweep | None = None,
) -> Path:
    """Write the report of a bundle as one HTML file; an existing file is replaced.

    `dense` is a bundle of the same model compiled with `dense=True`, for layer by layer
    comparison; `bench` a file with what `topiarist bench BUNDLE --json` printed. `predictions` are
    a latency model's; `sweep` is a family of pruned networks. The same input gives the same bytes.
    Raises BundleError, OutputError, or ValueError where the rest doesn't belong to the bundle.
    """
    bundle, output = Path(bundle), check_output(Path(output))
    manifest = read_manifest(bundle)
    baseline = None
    if dense is not None:
        baseline = read_manifest(dense)
        check_dense(baseline, manifest, Path(dense))
    timed = None if bench is None else read_bench(Path(bench), bundle)
    page = report_page(
        manifest, bundle.resolve().name, Details(baseline, timed, predictions, sweep)
    )
    # A name may hold half of a surrogate pair, which no encoding has.
    write_file(output, page.encode("utf-8", "xmlcharrefreplace"))
    return output


def report_page(manifest: Manifest, bundle: str, details: Details | None = None) -> str:
    """The page as text; `bundle` is the bundle's name."""
    details = details or Details()
    predictions = details.predictions or Predictions("")
    predictions.check(layer.layer for layer in manifest.layers)
    baseline = details.dense.layers if details.dense is not None else ()
    rows = rows_of(manifest.layers, baseline, predictions.layer_us)
    by_name = {row.layer: row for row in rows}
    bars = pictures.sorted_bars(rows, manifest.others)
    steps, stays = outlook(rows, predictions.curves)
    return _template().render(
        manifest=manifest,
        title=bundle if manifest.source is None else manifest.source.name,
        bundle=bundle,
        figures=figures(manifest, rows, details),
        disturbed=_disturbed(manifest),
        rows=rows,
        columns=_columns(rows),
        heads=_heads(manifest, details.dense is not None),
        compared=_compared(manifest, details.dense is not None),
        estimated=any(row.estimated and row.us for row in rows),
        stages=pictures.stage_bars(rows, manifest.others),
        sorted_bars=bars,
        half=pictures.half(bars),
        parts=pictures.parts(rows, manifest.others),
        families={row.family: FAMILIES[row.family] for row in rows},
        dots=pictures.dot_chart(rows),
        network_curves=[(c, pictures.curve_plot(c)) for c in predictions.curves if c.layer is None],
        layer_curves=[
            (by_name[c.layer], pictures.curve_plot(c, by_name[c.layer]))
            for c in predictions.curves
            if c.layer is not None
        ],
        scatter=pictures.scatter(rows),
        prediction=_prediction(rows),
        source=predictions.source,
        steps=steps,
        total_us=_parts_us(manifest, others=True),
        shown=SHOWN,
        stays=stays,
        sweep=details.sweep,
        pareto=pictures.pareto(details.sweep) if details.sweep and details.sweep.points else None,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["text"] = texts
    for name in ("style.css", "sort.js"):
        assert environment.loader is not None
        source = environment.loader.get_source(environment, name)[0]
        key = name.split(".")[0]
        environment.globals[key] = source
        environment.globals[f"{key}_hash"] = _content_hash(source)
    return environment.get_template("page.html")


def _content_hash(source: str) -> str:
    """What a page's Content-Security-Policy knows an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def figures(manifest: Manifest, rows: Sequence[Row], details: Details) -> list[Figure]:
    """The figures at the top, as far as they are known."""
    found = [
        _latency(manifest, rows, details.bench),
        _against_dense(manifest, rows, details.dense),
        *_against_engines(details.bench),
        _work(manifest),
        _rate(manifest, rows),
    ]
    return [figure for figure in found if figure is not None]


def _latency(manifest: Manifest, rows: Sequence[Row], bench: BenchResult | None) -> Figure | None:
    name = "Latency"
    if bench is not None and OURS in bench.engines:
        timing = bench.engines[OURS]
        spread = f"{timing.p10_ms:.3g} to {timing.p90_ms:.3g} ms in four of five"
        return Figure(
            name,
            texts.time_text(1e3 * timing.median_ms),
            f"median of {timing.runs} rounds on {_threads(timing.threads)}; {spread}",
        )
    if manifest.network_us:
        how = "the whole network, timed when it was compiled"
        return Figure(name, texts.time_text(manifest.network_us), how)
    total = _layers_us(rows)
    if total is None:
        return None
    if any(row.estimated for row in rows):
        how = "its layers with weights, counted and added up: nothing was timed"
        return Figure("Latency, estimated", texts.time_text(total), how)
    return Figure("Layers together", texts.time_text(total), "their times in the network added up")


def _against_dense(
    manifest: Manifest, rows: Sequence[Row], dense: Manifest | None
) -> Figure | None:
    if dense is not None:
        others = bool(dense.others and manifest.others)
        theirs, ours = _parts_us(dense, others), _parts_us(manifest, others)
        if theirs is None or ours is None:
            return None
        took = f"{texts.time_text(theirs)} against {texts.time_text(ours)}"
        how = f"{took}: {'all parts' if others else 'layers'} added up, not timed in turns"
        return Figure("Against its dense build", f"{theirs / ours:.2f}×", how)
    if not comparable(rows):
        return None
    both = [(row.dense_us, row.own_us) for row in rows if row.dense_us and row.own_us]
    ratio = sum(a or 0 for a, _ in both) / sum(b or 0 for _, b in both)
    how = _compared(manifest, by_build=False)
    return Figure("Against dense kernels", f"{ratio:.2f}×", f"its layers added up, {how}")


def _against_engines(bench: BenchResult | None) -> list[Figure]:
    if bench is None:
        return []
    return [
        Figure(
            f"Times the speed of {_ENGINES.get(name, name)}",
            f"{ratio.median:.2f}×",
            f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}, timed in turns",
        )
        for name, ratio in bench.ratio.items()
    ]


def _work(manifest: Manifest) -> Figure | None:
    dense = sum(layer.flops_dense for layer in manifest.layers)
    nonzero = sum(layer.flops_nonzero for layer in manifest.layers)
    if not dense:
        return None
    return Figure(
        "Work that is left",
        texts.share_text(nonzero / dense),
        f"{_flops(nonzero)} on nonzeros, of {_flops(dense)}",
    )


def _rate(manifest: Manifest, rows: Sequence[Row]) -> Figure | None:
    total, peak = _layers_us(rows), manifest.target.peak_gflops
    if total is None or peak is None or any(row.estimated for row in rows):
        return None
    rate = sum(layer.flops_nonzero for layer in manifest.layers) / total / 1e3
    share = rate / (peak * min(manifest.threads, manifest.target.cores))
    return Figure(
        "Speed on nonzeros",
        f"{rate:.0f} GFLOP/s",
        f"in its layers: {texts.share_text(share)} of the machine's peak in registers",
    )


def _layers_us(rows: Sequence[Row]) -> float | None:
    """The layers' times added up, None where one is unknown."""
    times = [row.us for row in rows if row.us is not None]
    return sum(times) if times and len(times) == len(rows) else None


def _parts_us(manifest: Manifest, others: bool) -> float | None:
    """Layers, and `others`, the work without weights, added up; None where one wasn't timed."""
    times = [layer.run_us for layer in manifest.layers if layer.run_us]
    if not times or len(times) < len(manifest.layers):
        return None
    return sum(times) + sum(work.run_us for work in manifest.others if others)


def _disturbed(manifest: Manifest) -> tuple[float, float] | None:
    """The network's time and that of its parts, where these disagree by more than noise."""
    added = _parts_us(manifest, others=True)
    if added is None or not manifest.network_us or not manifest.others:
        return None
    ratio = manifest.network_us / added
    return (manifest.network_us, added) if not 1 / DISTURBED < ratio < DISTURBED else None


def _columns(rows: Sequence[Row]) -> frozenset[str]:
    """The table's columns that hold anything."""
    have = {
        "density": any(row.density is not None for row in rows),
        "us": any(row.us for row in rows),
        "dense": any(row.dense_us for row in rows),
        "roofline": any(row.roofline is not None for row in rows),
        "predicted": any(row.predicted_us is not None for row in rows),
    }
    return frozenset(name for name, found in have.items() if found)


def _compared(manifest: Manifest, by_build: bool) -> str:
    """How the times were taken that dense and sparse are compared by."""
    return "each in its network" if by_build else _TIMED[_timed(manifest)][0]


def _timed(manifest: Manifest) -> Conditions:
    how = {layer.timed for layer in manifest.layers}
    return how.pop() if len(how) == 1 else ""


def _heads(manifest: Manifest, by_build: bool) -> tuple[str, str, str]:
    """What the table's columns of times are called; "" where one would repeat the first."""
    timed = _timed(manifest)
    first = "µs, estimated" if timed == "estimate" else "µs in network"
    return (first, "", "µs in dense build") if by_build else (first, *_TIMED[timed][1:])


@dataclass(frozen=True)
class Accuracy:
    """How well a model predicts: mean error and share within a tenth, and both sums."""

    layers: int
    mean_error: float
    within: float
    predicted_us: float
    measured_us: float


def _prediction(rows: Sequence[Row]) -> Accuracy | None:
    known = [(row, row.error) for row in rows if row.error is not None]
    errors = [abs(error) for _, error in known if error is not None]
    if not errors:
        return None
    return Accuracy(
        layers=len(errors),
        mean_error=sum(errors) / len(errors),
        within=sum(error <= pictures.BAND for error in errors) / len(errors),
        predicted_us=sum(row.predicted_us or 0.0 for row, _ in known),
        measured_us=sum(row.us or 0.0 for row, _ in known),
    )


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _flops(flops: int) -> str:
    return f"{flops / 1e9:.2f} GFLOP" if flops >= 1e8 else f"{flops / 1e6:.2f} MFLOP"
