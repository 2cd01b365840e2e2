"""A user's own module: its layers by the compiler's names, and zeros that reach the file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch.utils.data import DataLoader, TensorDataset

from tests.models import run_onnx
from tests.pruning.dppnet.resnet import ResNet
from topiarist.pruning.gsl.methods import Surgery
from topiarist.pruning.gsl.pruner import Pruner, prunable_layers
from topiarist.pruning.gsl.training import GslSettings, train_guided
from topiarist.pruning.guidance import EveryZeroPays
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.training.onnx_export import modules_of, write_onnx

SETTINGS = GslSettings(Surgery(0.5, ramp=4), rounds=2, tune_rounds=1, steps=3)


def test_a_module_and_a_data_loader_to_a_file_with_exact_zeros(tmp_path):
    network = ResNet(1, (8, 16), classes=4)
    image = torch.randn(1, 3, 8, 8)
    write_onnx(network, image, tmp_path / "dense.onnx", fold=False)
    layers = modules_of(network, onnx.load(tmp_path / "dense.onnx"))
    modules = list(prunable_layers(network).values())
    assert sorted(map(id, layers.values())) == sorted(map(id, modules))
    batches = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    loader = DataLoader(batches, 8, shuffle=True)
    train_guided(network, layers, loader, EveryZeroPays(layers), SETTINGS)
    for fold in (True, False):
        path = tmp_path / f"pruned-{fold}.onnx"
        write_onnx(network, image, path, fold=fold)
        weights = [layer.weight for layer in weighted_layers(onnx.load(path))]
        kept = sorted(int((module.weight != 0).sum()) for module in modules)
        assert sorted(int(np.count_nonzero(weight)) for weight in weights) == kept
        assert sum(kept) < 0.9 * sum(weight.size for weight in weights)
        (found,) = run_onnx(onnx.load(path), {"input": image.numpy()})
        np.testing.assert_allclose(found, network(image).detach().numpy(), atol=1e-4)


def test_the_hook_alone_serves_a_loop_of_ones_own():
    network = ResNet(1, (8,), classes=4)
    pruner = Pruner(prunable_layers(network), Surgery(0.5))
    optimizer = torch.optim.Adam(network.parameters())
    pruner.attach(optimizer)
    pruner.prune(["conv1"])
    network(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    pruner.freeze("conv1")
    assert 0 < float((network.conv1.weight == 0).float().mean()) < 1
    assert (network.fc.weight != 0).all()
