"""The report: complete, self-contained, escaped, honest about what is an estimate."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from topiarist.compiler.cli import app
from topiarist.compiler.compiled import LayerChoice, LayerLimits, OtherWork, TensorSignature
from topiarist.compiler.manifest import Manifest, SourceModel
from topiarist.compiler.report import charts, pictures, texts
from topiarist.compiler.report.inputs import (
    Curve,
    Predictions,
    Sweep,
    SweepPoint,
    read_sweep,
    write_sweep,
)
from topiarist.compiler.report.layers import comparable, knobs_text, rows_of, short_names
from topiarist.compiler.report.outlook import Stay, outlook
from topiarist.compiler.report.page import Details, report_page, write_report
from topiarist.compiler.report.plots import write_sweep_plot
from topiarist.errors import BundleError, OutputError
from topiarist.targets import registry

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
OPTIONAL = ("next", "curves", "predicted", "sweep")
CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROME = next((path for name in CHROMES if (path := shutil.which(name))), None)


def layer(name: str, **changes: Any) -> LayerChoice:
    """A pruned 3x3 layer that runs sparse."""
    choice = LayerChoice(
        layer=name,
        kind="conv",
        kernel="direct_sparse",
        config={"rows": 1, "cols": 7, "in_block": 64, "weights_outside": False},
        input_layout="a",
        output_layout="b",
        density=0.1,
        flops_dense=2_000_000,
        flops_nonzero=200_000,
        run_us=50.0,
        reason="fastest of 4 timed",
        candidates=(
            ("direct_sparse 1x7x1/64", 40.0),
            ("block_sparse 1x2x4/64", 90.0),
            ("direct_dense 1x4x6/64", 160.0),
            ("winograd_dense F(4x4) 2/2x12", 120.0),
        ),
        limits=LayerLimits(0, 10.0, 0.0, "compute", 0.2),
        explanation=(f"{name} is explained.", "It is 3.0x faster."),
        weight_shape=(64, 32, 3, 3),
        output_shape=(1, 64, 28, 28),
        strides=(2, 2),
        pattern="unstructured",
        timed="alone",
    )
    return dataclasses.replace(choice, **changes)


def dense_layer(name: str, us: float = 300.0) -> LayerChoice:
    return layer(
        name,
        kernel="direct_dense",
        density=1.0,
        run_us=us,
        candidates=(("direct_dense 1", us),),
        pattern="dense",
        output_shape=(1, 64, 56, 56),
    )


def manifest(*layers: LayerChoice, **changes: Any) -> Manifest:
    known: dict[str, Any] = {
        "versions": {"topiarist": "0.1.0", "apache-tvm": "0.27.0"},
        "target": dataclasses.replace(
            registry.get("x86-avx512"), device_model="Some CPU", peak_gflops=200.0, bandwidth_gbs=20
        ),
        "threads": 1,
        "inputs": (TensorSignature("x", (1, 3, 224, 224), "float32"),),
        "outputs": (TensorSignature("y", (1, 10), "float32"),),
        "params": (),
        "layers": layers,
        "files": {},
        "source": SourceModel("net.onnx", "ab" * 32, "/models/net.onnx"),
        "created": "2026-01-31T12:00:00Z",
    }
    return Manifest(**{**known, **changes})


def network(**changes: Any) -> Manifest:
    """A dense stem, two pruned layers, a classifier, and work without weights."""
    fc = layer(
        "fc",
        kind="linear",
        kernel="dense_linear",
        config={},
        density=1.0,
        run_us=20.0,
        candidates=(("dense_linear", 18.0),),
        weight_shape=(10, 64),
        output_shape=(1, 10),
        strides=(),
        pattern="dense",
    )
    others = (OtherWork("pool", "pooling", 9.0), OtherWork("x to y", "change of layout", 11.0))
    found = {"others": others, "network_us": 450.0, **changes}
    return manifest(dense_layer("stem"), layer("a.1"), layer("a.2", run_us=60.0), fc, **found)


def everything() -> Details:
    """All that a report may be given."""
    densities = (1.0, 0.3, 0.1, 0.05, 0.01)
    curves = (
        Curve("stem", densities, (300.0, 300.0, 299.0, 250.0, 200.0), (1.0, 300.0)),
        Curve("a.1", densities, (120.0, 80.0, 50.0, 40.0, 30.0), (0.1, 50.0)),
        Curve("a.2", densities, (120.0, 80.0, 50.0, 30.0, 30.0)),
        Curve("fc", densities, (20.0, 20.0, 20.0, 20.0, 20.0)),
        Curve(None, densities, (560.0, 480.0, 419.0, 340.0, 280.0), (0.3, 450.0)),
    )
    points = tuple(
        SweepPoint(speedup, 560.0 / speedup, accuracy, f"{speedup}x")
        for speedup, accuracy in ((1, 0.91), (2, 0.905), (3, 0.89))
    )
    predictions = Predictions("a model of 9 records", {"stem": 310.0, "a.1": 45.0}, curves)
    return Details(predictions=predictions, sweep=Sweep(points, "top-1 accuracy"))


VOID = ("meta",)  # without an end in HTML
SHAPES = ("rect", "line", "circle", "polyline", "polygon")  # SVG knows <rect/>, HTML no <p/>


class Page(HTMLParser):
    """Tags in balance, attributes, and text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES, f"<{tag}/> stays open in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def ids(self) -> set[str]:
        return {str(a["id"]) for _, a in self.tags if "id" in a}


@pytest.mark.parametrize("details", [Details(), everything()], ids=["alone", "everything"])
def test_the_page_needs_nothing_else(details: Details) -> None:
    """It parses, refers to nothing outside, and forbids the browser to load anything."""
    text = report_page(network(), "net.topi", details)
    page = Page(text)
    assert "url(" not in text and "@import" not in text
    ids = page.ids()
    for _, attributes in page.tags:
        assert "src" not in attributes and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            target = str(attributes["href"])
            assert target.startswith("#") and target[1:] in ids
    assert not page.all("link") and len(page.all("script")) == 1
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_every_layer_is_there() -> None:
    text = Page(report_page(network(), "net.topi")).text
    for choice in network().layers:
        assert choice.layer in text
        for sentence in choice.explanation:
            assert sentence in text
    for word in ("Some CPU", "net.onnx", "2026-01-31", "topiarist 0.1.0", "450 µs"):
        assert word in text
    assert "32 → 64, 3×3 /2, 28×28" in text and "rows 1, cols 7, in_block 64" in text
    assert "28×28 pixels" in text and "change of layout" in text


def test_nothing_is_left_of_what_was_not_given() -> None:
    page = report_page(network(), "net.topi")
    ids = Page(page).ids()
    assert not ids & set(OPTIONAL) and {"time", "dense", "layers"} <= ids
    assert "predict" not in page.split("</style>")[1].lower()
    assert set(OPTIONAL) <= Page(report_page(network(), "net.topi", everything())).ids()


def test_a_manifest_with_next_to_nothing() -> None:
    """As `compile` never writes it, but nobody knows what it will write."""
    bare = layer(
        "only",
        config={},
        density=None,
        flops_dense=0,
        flops_nonzero=0,
        run_us=None,
        candidates=(),
        limits=None,
        explanation=(),
        weight_shape=(),
        output_shape=(),
        strides=(),
        pattern="",
        timed="",
    )
    target = dataclasses.replace(registry.get("x86-avx2"), peak_gflops=None, bandwidth_gbs=None)
    for layers in ((bare,), ()):
        poor = manifest(*layers, source=None, created="", target=target)
        page = Page(report_page(poor, "poor.topi"))
        assert "poor.topi" in page.text and not page.ids() & {"time", "dense", *OPTIONAL}
        assert all(choice.layer in page.text for choice in layers)


def test_names_of_foreign_models_are_escaped() -> None:
    """Wherever they stand: names, kernels, versions, labels."""
    evil = layer(EVIL, pattern=EVIL, explanation=(EVIL,), config={EVIL: EVIL}, kernel=EVIL)
    others = (OtherWork(EVIL, EVIL, 5.0),)
    source = SourceModel(EVIL, EVIL, EVIL)
    inputs = (TensorSignature(EVIL, (1,), EVIL),)
    bad = manifest(
        evil, others=others, source=source, created=EVIL, versions={EVIL: EVIL}, inputs=inputs
    )
    curve = Curve(EVIL, (1.0, 0.1), (50.0, 40.0), (0.1, 45.0))
    details = Details(
        predictions=Predictions(EVIL, {EVIL: 45.0}, (curve,)),
        sweep=Sweep((SweepPoint(1.0, 50.0, 0.9, EVIL), SweepPoint(2.0, 25.0, 0.8, EVIL)), EVIL),
    )
    page = Page(report_page(bad, EVIL, details))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert " ".join(EVIL.split()) in page.text and "49" not in re.findall(r"{{ \d+", page.text)


def test_half_a_surrogate_pair_can_be_written(tiny_bundle: Path, tmp_path: Path) -> None:
    text = report_page(manifest(layer("odd \ud800 name")), "net.topi")
    assert text.encode("utf-8", "xmlcharrefreplace")
    assert write_report(tiny_bundle, tmp_path / "r.html").read_bytes().endswith(b"</html>\n")


def test_gains_compare_what_was_timed_alike() -> None:
    """Alone with alone, not the time in the network with the dense kernel's alone."""
    stem, first, second, _ = rows_of(network().layers)
    assert (first.own_us, first.dense_us, first.gain) == (40.0, 120.0, 3.0)
    assert (first.us, second.us, stem.gain) == (50.0, 60.0, 1.0)
    text = Page(report_page(network(), "net.topi")).text
    assert "µs alone" in text and "timed alone" in text


def test_gains_over_a_dense_build() -> None:
    """Both in their networks, where such a build is given."""
    dense = network(network_us=900.0)
    layers = tuple(
        dataclasses.replace(c, kernel="direct_dense", run_us=220.0) for c in dense.layers
    )
    dense = dataclasses.replace(dense, layers=layers)
    assert [row.gain for row in rows_of(network().layers, layers)][1] == 4.4
    text = Page(report_page(network(), "net.topi", Details(dense=dense))).text
    assert "2.00×" in text and "all parts added up, not timed in turns" in text
    assert "µs alone" not in text and "µs in dense build" in text
    dense = dataclasses.replace(dense, others=())
    text = Page(report_page(network(), "net.topi", Details(dense=dense))).text
    assert "880 µs against 430 µs: layers added up" in text


def test_estimates_are_called_so() -> None:
    estimated = [layer(name, run_us=None, timed="estimate", limits=None) for name in ("one", "two")]
    text = Page(report_page(manifest(*estimated), "net.topi")).text
    assert "Latency, estimated" in text and "nothing was timed" in text and "~40.0" in text
    assert "in network" not in text and "measured when" not in text


def test_a_disturbed_machine_is_named() -> None:
    """The whole against its parts: 450 us in layers and other work."""
    assert "Another program was at work" not in report_page(network(), "net.topi")
    assert "Another program was at work" in report_page(network(network_us=700.0), "net.topi")


def test_the_pieces_of_bars_make_up_their_bars() -> None:
    rows = rows_of(network().layers)
    bars = pictures.stage_bars(rows, network().others)
    assert [bar.name for bar in bars] == [
        "56×56 pixels", "28×28 pixels", "fully connected", "no weights"
    ]  # fmt: skip
    assert sum(bar.share for bar in bars) == pytest.approx(1)
    assert max(bar.segments[-1].x + bar.segments[-1].width for bar in bars) == pytest.approx(100)
    ranked = pictures.sorted_bars(rows, network().others)
    assert [bar.us for bar in ranked] == sorted((bar.us for bar in ranked), reverse=True)
    assert sum(part.us for part in pictures.parts(rows, network().others)) == pytest.approx(450)
    assert pictures.half(ranked) == 1


def test_what_to_prune_next() -> None:
    """The most gain first, between levels of the curve; and why the others stay."""
    details = everything()
    assert details.predictions is not None
    steps, stays = outlook(rows_of(network().layers), details.predictions.curves)
    assert [(s.row.layer, s.next_density, round(s.gain_us, 6)) for s in steps] == [
        ("stem", 0.05, 50.0),  # the first level that pays
        ("a.2", 0.05, 24.0),  # of 60 µs measured, where 50 were predicted
        ("a.1", 0.05, 10.0),
    ]
    assert [s.now_us for s in steps] == [300.0, 60.0, 50.0]
    assert (steps[2].least_density, steps[2].least_us) == (0.01, 30.0)
    assert steps[2].dropped == round(0.05 * 64 * 32 * 9)
    assert [stay.row.layer for stay in stays] == ["fc"]
    assert "No level down to 1 %" in stays[0].reason
    sparsest = outlook(rows_of([layer("a", density=0.01)]), [Curve("a", (1.0, 0.01), (9.0, 3.0))])
    assert isinstance(sparsest[1][0], Stay) and "already the sparsest" in sparsest[1][0].reason
    slow = dataclasses.replace(
        layer("a"), limits=LayerLimits(9, 1.0, 30.0, "memory", 0.6), kernel="depthwise"
    )
    flat = Curve("a", (1.0, 0.05), (9.0, 9.0))
    assert "one input channel" in outlook(rows_of([slow]), [flat])[1][0].reason
    waiting = dataclasses.replace(slow, kernel="direct_dense")
    assert "waits for memory, at 60.0 %" in outlook(rows_of([waiting]), [flat])[1][0].reason


def test_a_curve_between_its_points() -> None:
    curve = Curve("a", (0.01, 1.0, 0.1), (10.0, 100.0, 40.0))
    assert curve.at(0.1) == 40 and curve.at(10**-1.5) == pytest.approx(25)
    assert (curve.at(1.0), curve.at(0.001)) == (100, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve("a", (1.0,), (5.0,)),
        lambda: Curve("a", (1.0, 0.5), (5.0,)),
        lambda: Curve("a", (1.0, 1.0), (5.0, 5.0)),
        lambda: Curve("a", (1.0, 0.0), (5.0, 5.0)),
        lambda: Curve("a", (1.0, 0.5), (5.0, float("nan"))),
        lambda: Curve("a", (1.0, 0.5), (5.0, 5.0), (0.5, -1.0)),
        lambda: SweepPoint(1.0, 5.0, 91.0, "percent"),
        lambda: SweepPoint(0.0, 5.0, 0.9, "no speed"),
        lambda: SweepPoint(1.0, 5.0, 0.9, ""),
        lambda: Predictions("", {"a": 0.0}),
        lambda: Predictions("", {}, (Curve("a", (1, 0.5), (5, 4)),) * 2),
        lambda: report_page(network(), "n", Details(predictions=Predictions("", {"zzz": 1.0}))),
    ],
)
def test_wrong_input_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("values", [(3.0, 4.0), (0.7, 1300.0), (5.0, 5.0), (1e-3, 1e5), (10, 100)])
def test_axes_hold_their_values(values: tuple[float, float]) -> None:
    """Few marks, in order, around all values."""
    axes = [
        charts.log_axis(values, str),
        charts.linear_axis(values, str, zero=True),
        charts.linear_axis(values, str, zero=False),
    ]
    for axis in axes:
        assert axis.low <= min(values) and max(values) <= axis.high
        assert 2 <= len(axis.ticks) <= 12
        assert [t.at for t in axis.ticks] == sorted(t.at for t in axis.ticks)
        assert all(-1e-9 <= t.at <= 1 + 1e-9 for t in axis.ticks)
        assert sum(not tick.minor for tick in axis.ticks) >= 2


def test_labels_of_a_crowd_do_not_overlap() -> None:
    """Where there is no room, a point goes without."""
    points = tuple(SweepPoint(1.0, 100 + i, 0.9 - i * 1e-4, f"network {i}") for i in range(12))
    points += (SweepPoint(1.0, 500.0, 0.5, "alone"),)
    plot = pictures.pareto(Sweep(points))
    shown = [mark for mark in plot.marks if mark.label]
    assert "alone" in [mark.label for mark in shown] and len(shown) < len(points)
    for i, a in enumerate(shown):
        for b in shown[:i]:
            apart = abs(a.label_y - b.label_y) >= 10 or abs(a.label_x - b.label_x) >= 30
            assert apart, (a, b)
    assert plot.line.count(",") == 1  # the first is faster and better than all others


SWEEP = Sweep((SweepPoint(1, 560.0, 0.9165, "dense"), SweepPoint(2.0, 280, 0.9, "2x")), "top-1")


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_sweep(SWEEP, path)
    assert read_sweep(path) == SWEEP


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "other"}, "is no sweep"),
        ({"quantity": ""}, "quantity"),
        ({"quantity": 1}, "quantity"),
        ({"points": []}, "at least one point"),
        ({"points": {}}, "at least one point"),
        ({"points": [3]}, "point 1 is no JSON object"),
        ({"points": [{"label": "a"}]}, "point 1 lacks 'accuracy'; a point has speedup"),
        ({"accuracy": 91.0}, "point 2: 2x: the accuracy is a share"),
        ({"latency_us": -1}, "point 2: the sweep's 2x has a time of -1"),
        ({"latency_us": "fast"}, "latency_us is no number: 'fast'"),
        ({"speedup": True}, "speedup is no number"),
        ({"label": 3}, "label is no text"),
        ({"colour": "red"}, "point 2 has the unknown field 'colour'"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    data = SWEEP.to_json()
    data["points"] = list(data["points"])
    if change.keys() <= data.keys():
        data |= change
    else:
        data["points"][1] |= change
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=problem) as caught:
        read_sweep(path)
    assert "sweep.json" in str(caught.value)
    for text in ("{", "[]", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no sweep"):
            read_sweep(path)
    with pytest.raises(ValueError, match="can't read"):
        read_sweep(tmp_path / "no.json")


def test_a_sweep_as_a_picture(tmp_path: Path) -> None:
    """The same bytes each time; names of formulas are names."""
    pytest.importorskip("matplotlib")
    points = (*SWEEP.points, SweepPoint(3.0, 200.0, 0.8, "$x_{$ \\frac"))
    first = write_sweep_plot(Sweep(points, "a $share_"), tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == write_sweep_plot(Sweep(points, "a $share_"), tmp_path / "b.png").read_bytes()
    with pytest.raises(OutputError, match="is a folder"):
        write_sweep_plot(SWEEP, tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OutputError, match=r"topiarist\[plots\]"):
        write_sweep_plot(SWEEP, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_command_plots_a_sweep(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, sweep, plot = (tmp_path / name for name in ("r.html", "sweep.json", "plot.png"))
    write_sweep(SWEEP, sweep)
    base = ["report", str(tiny_bundle), "-o", str(output)]
    result = CliRunner().invoke(app, [*base, "--sweep", str(sweep), "--plot", str(plot)])
    assert result.exit_code == 0 and str(plot) in result.stdout, result.output
    text = Page(output.read_text()).text
    assert "91.65 %" in text and "top-1" in text and plot.stat().st_size > 1000
    dense, faster = SWEEP.points[:2]
    assert f"{faster.speedup:.2f}×" in text and SWEEP.dense_us == dense.latency_us
    assert f"{dense.latency_us / faster.latency_us:.2f}×" in text
    result = CliRunner().invoke(app, [*base, "--plot", str(plot)])
    assert result.exit_code == 2 and "--sweep" in result.stderr


def test_numbers_as_text() -> None:
    assert [texts.time_text(us) for us in (7.54, 99.96, 254.4, 999.4, 999.6, 13444.0, 1e6)] == [
        "7.54 µs", "100 µs", "254 µs", "999 µs", "1.00 ms", "13.4 ms", "1.00 s"
    ]  # fmt: skip
    assert [texts.share_text(s) for s in (None, 0.0, 0.0004, 0.1234, 1.0)] == [
        "–", "0 %", "< 0.1 %", "12.3 %", "100 %"
    ]  # fmt: skip
    assert [texts.count_text(n) for n in (None, 940, 12_400, 999_600)] == [
        "–", "940", "12 k", "1.0 M"
    ]  # fmt: skip
    assert (texts.gain_text(3.94), texts.error_text(-0.041)) == ("3.9×", "−4.1 %")
    assert knobs_text({"a": 1, "b": False, "c": True, "d": (4, 2)}).replace("\xa0", " ") == (
        "a 1, c, d 4×2"
    )
    assert short_names(["m/a/x", "m/b"]) == ["a/x", "b"]
    assert short_names(["m.a", "m."]) == ["a", "m."] and short_names(["one/two"]) == ["one/two"]
    assert short_names(["m/a/Conv", "m/b/Conv"]) == ["a", "b"] and short_names([]) == []
    (long, other) = short_names(["f/" + 30 * "x" + "y", "g"])
    assert long == "…" + 18 * "x" + "y" and other == "g"


def test_written_from_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """The same bytes each time; the hand-made kernel's layer is in it."""
    first = write_report(tiny_bundle, tmp_path / "a.html").read_bytes()
    assert first == write_report(tiny_bundle, tmp_path / "b.html").read_bytes()
    assert "hand_made" in Page(first.decode()).text


def test_what_was_timed_in_turns_comes_on_top(tiny_bundle: Path, tmp_path: Path) -> None:
    """And only if it is this bundle's."""
    timing = {"median_ms": 1.25, "p10_ms": 1.2, "p90_ms": 1.4, "runs": 9, "threads": 1}
    document = {
        "bundle": str(tiny_bundle),
        "engines": {"topiarist": {**timing, "version": "1"}, "ort": {**timing, "version": "2"}},
        "ratio": {"ort": {"median": 3.7, "low": 3.5, "high": 3.9}},
        **{"rounds": 9, "threads": 1, "batch": 1},
    }
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(document))
    page = write_report(tiny_bundle, tmp_path / "r.html", bench=bench).read_text()
    assert "1.25 ms" in page and "3.70×" in page and "3.50 to 3.90" in page
    for wrong in ("{", "[]", "{}", json.dumps({**document, "bundle": "other.topi"})):
        bench.write_text(wrong)
        with pytest.raises(ValueError, match=r"bench\.json"):
            write_report(tiny_bundle, tmp_path / "r.html", bench=bench)


def test_only_the_same_network_is_compared_with(
    tiny_bundle: Path, tmp_path: Path, edit_manifest: Callable[..., None]
) -> None:
    """Dense, of the same layers, for the same machine."""
    dense = tmp_path / "dense.topi"
    shutil.copytree(tiny_bundle, dense)
    assert write_report(tiny_bundle, tmp_path / "r.html", dense=dense)
    data = json.loads((dense / "manifest.json").read_text())
    (only,) = data["layers"]
    for change, problem in (
        ({"threads": 2}, "is for"),
        ({"layers": []}, "another network"),
        ({"layers": [{**only, "kernel": "direct_sparse"}]}, "no dense build"),
    ):
        edit_manifest(dense, **{**data, **change})
        with pytest.raises(BundleError, match=problem):
            write_report(tiny_bundle, tmp_path / "r.html", dense=dense)


def test_bundles_of_before_are_read(
    tiny_bundle: Path, tmp_path: Path, edit_manifest: Callable[..., None]
) -> None:
    """Without the network's time, without shapes."""
    path = tiny_bundle / "manifest.json"
    data = json.loads(path.read_text())
    new = ("weight_shape", "output_shape", "strides", "groups", "pattern", "timed")
    layers = [{k: v for k, v in entry.items() if k not in new} for entry in data["layers"]]
    old = {k: v for k, v in data.items() if k not in ("network_us", "others", "layers")}
    path.write_text(json.dumps({**old, "layers": layers}))
    edit_manifest(tiny_bundle)
    page = Page(write_report(tiny_bundle, tmp_path / "r.html").read_text())
    assert "hand_made" in page.text and "µs, timed alike" in page.text


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tiny_bundle), "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    written = {"report": str(output), "bytes": output.stat().st_size, "plot": None}
    assert json.loads(result.stdout) == written
    for arguments in (
        [str(tiny_bundle), "-o", str(tmp_path)],
        [str(tiny_bundle), "-o", str(tmp_path / "no" / "r.html")],
        [str(tmp_path / "no.topi"), "-o", str(output)],
        [str(tiny_bundle), "-o", str(output), "--bench", str(tmp_path / "no.json")],
    ):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output
    with pytest.raises(OutputError, match="is a folder"):
        write_report(tiny_bundle, tmp_path)


@pytest.mark.skipif(CHROME is None, reason=f"needs one of {', '.join(CHROMES)} on the PATH")
def test_in_a_browser(tmp_path: Path) -> None:
    """The script sorts the table by time and opens a layer, and nothing is complained about."""
    evil = dataclasses.replace(layer(EVIL, run_us=10.0))
    page = tmp_path / "report.html"
    net = network(layers=(*network().layers, evil))
    page.write_text(report_page(net, "net.topi", everything()), encoding="utf-8")

    def load(fragment: str) -> str:
        done = subprocess.run(
            [
                *(str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
                page.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout

    plain, by_time, opened = load(""), load("#sort=us"), load("#layer-1")
    order = r'<tbody id="layer-(\d+)"'
    assert re.findall(order, plain) == ["0", "1", "2", "3", "4"]
    assert re.findall(order, by_time) == ["0", "2", "1", "3", "4"]
    assert 'aria-sort="descending"' in by_time and 'aria-sort="' not in plain.split("</style>")[1]
    assert 'class="scripted"' in plain
    assert opened.count("<details open") == 1 and "<details open" not in plain


def test_few_layers_with_dense_times_are_not_the_whole() -> None:
    """A bundle from a log of finalists: most pruned layers have no dense time beside theirs."""
    both = dataclasses.replace(
        layer("a"),
        run_us=10.0,
        kernel="direct_sparse",
        candidates=(("direct_sparse 1x2x1/8", 10.0), ("direct_dense 1x2x4/8", 30.0)),
    )
    finalist = dataclasses.replace(both, layer="b", candidates=both.candidates[:1])
    assert comparable(rows_of([both]))
    assert not comparable(rows_of([both, finalist]))
