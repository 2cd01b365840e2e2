"""ONNX files of DPPNet: ONNX Runtime and our compiler agree with PyTorch."""

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch import nn

from tests.models import relative_error, run_onnx
from tests.pruning.dppnet.resnet import ResNet
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.pruning.dppnet.convert import convert
from topiarist.pruning.dppnet.export import export_onnx
from topiarist.pruning.dppnet.layer import dpp_layers


def _pruned(network):
    """Three of four experts with two positions each, the last one with none."""
    model = convert(network, copy_weights=False).eval()
    for layer in dpp_layers(model).values():
        layer.use_masks("frozen")
        masks = layer.frozen_masks.flatten(1)
        masks.zero_()
        for expert in range(3):
            masks[expert, expert : expert + 2] = 1
        layer.attention.excite.bias.data.normal_()
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module with images and the file that it was exported to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _pruned(ResNet(1, (16, 32)))
        images = torch.randn(3, 3, 16, 16)
    path = tmp_path_factory.mktemp("dppnet") / "model.onnx"
    export_onnx(model, images[:1], path)
    with torch.no_grad():
        return images.numpy(), model(images).numpy(), path


def test_onnx_runtime_agrees_at_any_batch(trained):
    images, wanted, path = trained
    model = onnx.load(path)
    for x, y in ((images, wanted), (images[1:2], wanted[1:2])):
        assert relative_error(run_onnx(model, {"input": x})[0], y) < 1e-5


def test_operators_are_standard_and_zeros_are_zeros(trained):
    model = onnx.load(trained[2])
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    experts = [array for name, array in weights.items() if "kernels" in name]
    assert len(experts) == 4  # layers, each with three experts
    assert all(np.count_nonzero(w) == w.size // 9 * 2 for w in experts)


@pytest.mark.parametrize("batch", [1, 3])
def test_our_compiler_mixes_the_experts(trained, tmp_path, batch):
    images, wanted, path = trained
    bundle = tmp_path / "model.topi"
    compiled = compile_model(path, batch=batch, output=bundle, measure=False)
    assert [layer.kernel for layer in compiled.layers].count("dynamic_conv") == 4
    session = Session(bundle)
    parts = [session.run(None, {"input": part})[0] for part in np.split(images, 3 // batch)]
    assert relative_error(np.concatenate(parts), wanted) < 1e-5


def test_bias_stride_and_switched_off_experts(tmp_path):
    """1x1 kernels, of which only some experts are on, and a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, stride=2))
        model = convert(network).eval()
        x = torch.randn(2, 3, 6, 6)
    layer = dpp_layers(model)["1"]
    layer.use_masks("frozen")
    layer.frozen_masks[1:3] = 0
    export_onnx(model, x, tmp_path / "model.onnx")
    exported = onnx.load(tmp_path / "model.onnx")
    kernels = next(t for t in exported.graph.initializer if "kernels" in t.name)
    assert list(kernels.dims) == [2 * 8, 8, 1, 1]
    with torch.no_grad():
        wanted = model(x).numpy()
    assert relative_error(run_onnx(exported, {"input": x.numpy()})[0], wanted) < 1e-5
    compile_model(tmp_path / "model.onnx", batch=2, output=tmp_path / "b.topi", measure=False)
    y = Session(tmp_path / "b.topi").run(None, {"input": x.numpy()})[0]
    assert relative_error(y, wanted) < 1e-5


def test_onnx_runtimes_own_rewrites_leave_the_layers_findable(trained, tmp_path):
    """Constants are folded, nodes renamed and fused; the file is still a dynamic network."""
    import onnxruntime

    images, wanted, path = trained
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "rewritten.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    compiled = compile_model(
        tmp_path / "rewritten.onnx", batch=3, output=tmp_path / "b.topi", measure=False
    )
    assert [layer.kernel for layer in compiled.layers].count("dynamic_conv") == 4
    y = Session(tmp_path / "b.topi").run(None, {"input": images})[0]
    assert relative_error(y, wanted) < 1e-5
