"""Conversion of networks, and the count of their multiply-adds."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch import nn

from tests.pruning.dppnet.resnet import Bottleneck, ResNet
from topiarist.errors import TrainingError
from topiarist.pruning.dppnet.convert import convert, left_alone
from topiarist.pruning.dppnet.flops import count_flops
from topiarist.pruning.dppnet.layer import DPPSettings, dpp_layers


def _macs(report, model):
    return sum(layer.dense for layer in report.layers if layer.name in dpp_layers(model))


def test_stem_and_shortcuts_stay():
    network = ResNet(3, (16, 32, 64))
    model = convert(network)
    assert not dpp_layers(network)
    assert len(dpp_layers(model)) == 18
    assert left_alone(network) == {"conv1", "layers.3.downsample.0", "layers.6.downsample.0"}


@pytest.mark.parametrize(("blocks", "millions"), [(3, 40.1), (9, 125.0)])
def test_flops_of_resnet_20_and_56(blocks, millions):
    model = convert(ResNet(blocks, (16, 32, 64)), DPPSettings(experts=1))
    report = count_flops(model, torch.zeros(1, 3, 32, 32))
    assert round(_macs(report, model) / 1e6, 1) == millions
    assert report.kept == report.dense
    assert report.reduction == 0


def test_conversion_keeps_what_a_network_computes():
    network = ResNet(1, (8, 16)).eval()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(convert(network)(x), network(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(convert(network, copy_weights=False)(x), network(x), atol=1e-2)


def test_bottleneck_has_experts_on_or_off():
    model = convert(Bottleneck(8, 4), DPPSettings(experts=2), leave=["downsample"])
    layers = dpp_layers(model)
    assert list(layers) == ["conv1", "conv2", "conv3"]
    assert layers["conv1"].masks().shape == (2, 1, 1)
    assert left_alone(Bottleneck(8, 4)) == {"conv1", "downsample"}


def test_a_module_used_twice_stays_one():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 1), conv, conv))
    assert model[1] is model[2]
    assert model[1] is dpp_layers(model)["1"]


def test_flops_by_hand():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)))
    layer = dpp_layers(model)["1"]
    layer.use_masks("frozen")
    layer.frozen_masks.zero_()
    layer.frozen_masks[0, 0, :2] = 1
    layer.frozen_masks[2, 0, 1:] = 1
    first, second = count_flops(model, torch.zeros(1, 3, 8, 8)).layers
    assert (first.name, first.dense, first.kept, first.overhead) == ("0", 768, 768, 0)
    assert (second.dense, second.kept, second.union) == (6 * 4 * 9 * 16, 6 * 4 * 3 * 16, 3)
    hidden = 2  # int(4 / 4) + 1
    assert second.overhead == 6 * 4 * 4 + 4 * hidden + hidden * 4 * 6


def test_counting_leaves_the_network_as_it_was():
    model = convert(ResNet(1, (8,))).train()
    before = {k: v.clone() for k, v in model.bn1.state_dict().items()}
    count_flops(model, torch.ones(1, 3, 8, 8))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.bn1.state_dict().items())
    with pytest.raises(ValueError, match="one image"):
        count_flops(model, torch.ones(2, 3, 8, 8))


def test_what_cannot_be_converted():
    with pytest.raises(TrainingError, match="'stem'"):
        convert(ResNet(1, (8,)), leave=["stem"])
    with pytest.raises(TrainingError, match="no Conv2d to convert"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
