"""The benchmarks' networks are the ones they are named after."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.benchmarks import networks
from topiarist.compiler.analysis import LayerReport, analyse


def _gmacs(layers: list[LayerReport]) -> float:
    return sum(layer.flops_dense for layer in layers) / 2e9


def _densities(model: onnx.ModelProto) -> dict[str, float]:
    return {layer.layer: layer.density for layer in analyse(model)}


@pytest.mark.parametrize(
    ("name", "layers", "gmacs"),
    [("resnet18", 21, 1.814), ("resnet34", 37, 3.664), ("mobilenet_v1", 28, 0.569)],
)
def test_network_has_the_known_size(name: str, layers: int, gmacs: float) -> None:
    """Layers and multiply-adds as published."""
    reports = analyse(networks.NETWORKS[name]())
    assert len(reports) == layers
    assert _gmacs(reports) == pytest.approx(gmacs, rel=0.002)


def test_vgg16_convs_have_the_known_size() -> None:
    """13 layers, 15.35 GMAC."""
    reports = analyse(networks.vgg16_convs())
    assert len(reports) == 13
    assert _gmacs(reports) == pytest.approx(15.347, rel=0.002)


def test_pruning_leaves_the_first_and_depthwise_layers_and_a_lone_classifier() -> None:
    """The 1x1 layers get the density that was asked for."""
    found = _densities(networks.pruned("mobilenet_v1", 0.1))
    for name, density in found.items():
        dense = name in ("conv1", "fc") or name.endswith("_dw")
        assert density == pytest.approx(1.0 if dense else 0.1, abs=0.01), name


def test_same_seed_same_weights() -> None:
    """Two builds are one model."""
    assert networks.mobilenet_v1() == networks.mobilenet_v1()


def test_pruned_alexnet_has_the_published_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the published weights; 0.666 GMAC."""
    monkeypatch.setattr(networks, "PRUNED_ALEXNET", networks.SHARED / "nothing here")
    model = networks.pruned_alexnet_convs()
    found = _densities(model)
    assert found.pop("conv1") == 1
    assert found == pytest.approx(networks.ALEXNET_DENSITY, abs=0.001)
    assert _gmacs(analyse(model)) == pytest.approx(0.666, rel=0.002)


@pytest.mark.shared_data
@pytest.mark.skipif(not networks.PRUNED_ALEXNET.is_file(), reason="no alexnet_pruned_convs.npz")
def test_pruned_alexnet_uses_the_published_weights() -> None:
    """conv3 and conv4 are those of the file."""
    found = _densities(networks.pruned_alexnet_convs())
    with np.load(networks.PRUNED_ALEXNET) as file:
        assert found["conv3"] == pytest.approx(len(file["conv3_data"]) / (384 * 2304))
        nonzeros = len(file["conv4_1_data"]) + len(file["conv4_2_data"])
    assert found["conv4"] == pytest.approx(nonzeros / (384 * 1728))
