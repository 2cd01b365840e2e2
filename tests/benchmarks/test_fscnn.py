"""The figure of latency over sparsity: its engines compute, its crossings are where they are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.benchmarks import bench_activations, bench_fscnn, layers, plain_engines
from tests.graph_reference import outputs_of
from tests.models import Net
from topiarist.compiler.graph import Graph

SPARSITIES = (0, 50, 90)


def _curves(ours: Sequence[float], naive: Sequence[float], dense: float = 10) -> bench_fscnn.Curves:
    return bench_fscnn.Curves(
        SPARSITIES, {bench_fscnn.OURS: ours, bench_fscnn.NAIVE: naive}, {"ort": dense}
    )


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A residual block with a strided pooling, and a classifier."""
    net = Net(opset=17, seed=0)

    def conv(data: str, out: int, into: int, kernel: int, stride: int = 1) -> str:
        weight = net.constant(net.rng.standard_normal((out, into, kernel, kernel), np.float32))
        pads = [kernel // 2] * 4
        return net.node("Conv", data, weight, pads=pads, strides=[stride] * 2)

    x = net.node("Relu", conv(net.input(1, 3, 16, 16), 8, 3, 3))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    branch = conv(net.node("Relu", conv(x, 8, 8, 3, 2)), 8, 8, 3)
    x = net.node("Relu", net.node("Add", branch, conv(x, 8, 8, 1, 2)))
    pooled = net.node("Flatten", net.node("GlobalAveragePool", x))
    path = tmp_path_factory.mktemp("fscnn") / "model.onnx"
    weight = net.constant(net.rng.standard_normal((5, 8), np.float32))
    scores = net.node("Gemm", pooled, weight, transB=1)
    onnx.save(net.model(net.node("Softmax", scores)), path)
    return bench_fscnn.layers_of(path)


def test_naive_convolutions_run_for_any_zeros(graph: Graph) -> None:
    """The ones of the network; what they compute is tested with the operator."""
    assert len(plain_engines._convolutions(graph)) == 4
    plain_engines.CsrConvolutions(graph).engine("naive", graph).run()


@pytest.mark.skipif(not plain_engines.has_torch(), reason="needs PyTorch: topiarist[train]")
def test_the_network_in_pytorch_is_the_network(graph: Graph) -> None:
    """All of its layers."""
    (name,) = graph.inputs
    shape = graph.values[name].shape
    feeds = {name: np.random.default_rng(1).standard_normal(shape, np.float32)}
    (got,) = plain_engines.torch_function(graph)(feeds)
    (want,) = outputs_of(graph, feeds)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_medians_become_curves() -> None:
    """Ours, the naive one, and whatever dense engine ran."""
    samples = {"ort": [0.01, 0.01, 0.9]}
    for i, at in enumerate(SPARSITIES, 1):
        samples[bench_fscnn.label(bench_fscnn.OURS, at)] = [0.01 / i] * 3
        samples[bench_fscnn.label(bench_fscnn.NAIVE, at)] = [0.1 / i] * 3
    found = bench_fscnn.curves_of(SPARSITIES, samples)
    assert found.series[bench_fscnn.OURS] == pytest.approx([10, 5, 10 / 3])
    assert found.dense == pytest.approx({"ort": 10})


def test_crossings_in_words() -> None:
    """Everywhere, between two sparsities, nowhere; and what we lose to ourselves."""
    lines = bench_fscnn.crossings(_curves([9, 9.5, 2], [40, 20, 5]))
    # In logarithms: from 20 ms at 50 % to 5 ms at 90 %, 10 ms lie in the middle.
    middle = 100 * (1 - np.sqrt(0.5 * 0.1))
    assert lines == [
        "topiarist is faster than ort from 0 % zeros on",
        f"naive CSR is faster than ort from {middle:.0f} % zeros on",
        "topiarist has at least 0.95 times the speed of its own dense build",
    ]
    assert "at no sparsity" in bench_fscnn.crossings(_curves([9, 9, 9], [40, 30, 20]))[1]


def test_the_table_has_a_line_for_each_sparsity() -> None:
    """And a column for each engine."""
    shown = bench_fscnn.table("resnet50", _curves([9, 5, 2], [40, 20, 5]))
    assert [str(c.header) for c in shown.columns] == ["% zeros", "topiarist", "naive CSR", "ort"]
    assert list(shown.columns[2].cells) == ["40.0", "20.0", "5.0"]


def test_the_report_is_json() -> None:
    """With the crossings and the setting."""
    curves = _curves([9, 5, 2], [40, 20, 5])
    found = bench_fscnn.report("resnet50", curves, {"ort": [0.01]})
    assert found["crossings"]["topiarist over ort"] == 0
    assert found["worst_over_own_dense"] == 1
    assert found["versions"]["python"]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    """Of both series and the dense engines."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.png"
    bench_fscnn.draw("resnet50", _curves([9, 5, 2], [40, 20, 5]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_sparsities_on_the_command_line() -> None:
    """Dense is always among them."""
    assert bench_fscnn._sparsities("90,50") == (0, 50, 90)
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 99"):
        bench_fscnn._sparsities("100")


def test_density_of_what_convolutions_read(graph: Graph) -> None:
    """All of the image, and less behind a ReLU."""
    shape = graph.values[graph.inputs[0]].shape
    images = np.random.default_rng(1).standard_normal((2, *shape[1:]), np.float32)
    found = list(bench_activations.input_densities(graph, images).values())
    assert found[0] == 1
    assert len(found) == 4 and all(0.05 < density < 1 for density in found[1:])


def test_scattering_is_timed_at_every_density() -> None:
    """Beside our kernel and the plain operator; a small layer."""
    found = bench_activations.time_layer(layers.Shape(8, 8, 8, 3), seconds=0.01)
    ways = {bench_activations.OURS, bench_activations.PLAIN}
    ways |= {bench_activations.label(density) for density in bench_activations.DENSITIES}
    assert set(found["ms"]) == ways
    assert all(ms > 0 for ms in found["ms"].values())
    shown = bench_activations.time_table({"L": found})
    assert shown.row_count == len(ways) + 2


def test_where_scattering_wins() -> None:
    """Over the plain operator up to a density, over our kernel at none."""
    times = {bench_activations.label(d): 100 * d for d in bench_activations.DENSITIES}
    found = bench_activations.wins_up_to(
        times | {bench_activations.OURS: 0.5, bench_activations.PLAIN: 10}
    )
    assert found == {bench_activations.OURS: None, bench_activations.PLAIN: pytest.approx(0.1)}
