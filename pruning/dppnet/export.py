"""DPPNet as ONNX, in standard operators: ONNX Runtime runs it, and topiarist compiles it."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from topiarist.pruning.dppnet.convert import replace_modules
from topiarist.pruning.dppnet.layer import DPPConv2d, dpp_layers
from topiarist.pruning.training.onnx_export import write_onnx


class SharedExperts(nn.Module):
    """sum_p a[n, p, o] * conv(x_n, M_p * W_p)[o] + bias: a DPP layer with one kernel per expert.

    The kernels are constants, the same for all images, so that zeros of masks are zeros of
    weights. An expert without positions has no convolution.
    """

    def __init__(self, layer: DPPConv2d) -> None:
        super().__init__()
        self.attention = layer.attention.without_temperature()
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        kernels = layer.masked_experts().detach()
        self.experts = [p for p, kernel in enumerate(kernels) if kernel.any()] or [0]
        self.out_channels = kernels.shape[1]
        self.register_buffer("kernels", kernels[self.experts].flatten(0, 1))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W']."""
        shares = self.attention(x)
        if len(self.experts) < shares.shape[1]:
            shares = shares[:, self.experts]
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        outputs = functional.conv2d(x, self.get_buffer("kernels"), **window)
        size = (int(extent) for extent in outputs.shape[2:])  # constants, whatever the batch
        outputs = outputs.reshape(-1, len(self.experts), self.out_channels, *size)
        y = (outputs * shares[..., None, None]).sum(dim=1)
        return y if self.bias is None else y + self.bias[:, None, None]


def with_shared_experts(model: nn.Module) -> nn.Module:
    """A copy, for inference, with `SharedExperts` in place of DPP layers."""
    model = copy.deepcopy(model).eval()
    made = {layer: SharedExperts(layer) for layer in dpp_layers(model).values()}
    replace_modules(model, made)
    return model


def export_onnx(model: nn.Module, image: Tensor, path: Path) -> None:
    """Write the network, with the masks of now; `image` is [N, C, H, W], and any batch will do.

    Input and output are called "input" and "output".
    """
    write_onnx(with_shared_experts(model), image, path)
