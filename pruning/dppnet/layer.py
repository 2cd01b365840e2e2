"""A convolution whose kernel is mixed, for every image, from experts with learned masks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from topiarist.pruning.dppnet.gate import learned_masks

MaskMode = Literal["none", "learned", "frozen"]


@dataclass(frozen=True)
class DPPSettings:
    """What the layers of a network have in common; the defaults are the authors'."""

    experts: int = 4
    reduction: float = 0.25  # of the attention's hidden size
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.experts < 1 or self.reduction <= 0 or self.temperature <= 0:
            raise ValueError(f"all settings must be positive, got {self}")

    def hidden(self, channels: int) -> int:
        """The hidden size of the attention of a layer with `channels` inputs."""
        return self.experts if channels == 3 else int(self.reduction * channels) + 1


class Attention(nn.Module):
    """What each expert counts, for each image and output channel: [N, I, H, W] -> [N, P, O]."""

    def __init__(self, in_channels: int, out_channels: int, settings: DPPSettings) -> None:
        super().__init__()
        self.experts, self.out_channels = settings.experts, out_channels
        self.temperature = settings.temperature
        hidden = settings.hidden(in_channels)
        self.squeeze = nn.Linear(in_channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, settings.experts * out_channels)
        for linear in (self.squeeze, self.excite):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Sums to 1 over the experts."""
        hidden = functional.relu(self.squeeze(x.mean(dim=(2, 3))))
        logits = self.excite(hidden).reshape(-1, self.experts, self.out_channels)
        return torch.softmax(logits if self.temperature == 1 else logits / self.temperature, dim=1)

    def without_temperature(self) -> Attention:
        """A copy that computes the same, for inference: the weights are divided by it."""
        same = copy.deepcopy(self)
        with torch.no_grad():
            same.excite.weight /= self.temperature
            same.excite.bias /= self.temperature
        same.temperature = 1.0
        return same


class DPPConv2d(nn.Module):
    """output_n = conv(x_n, sum_p a[n, p, o] * M_p * W_p) + bias, in place of a `Conv2d`.

    `weight` is [P, O, I, kh, kw]. The masks M_p, [P, kh, kw], are absent, learned from `weight`
    and `threshold` [P, O], or frozen, as `mask_mode` says; it is part of the state dict.
    """

    frozen_masks: Tensor

    def __init__(self, like: nn.Conv2d, settings: DPPSettings, *, copy_weights: bool) -> None:
        """A layer of the shape of `like`; with `copy_weights` each expert starts as its weights."""
        super().__init__()
        if like.groups != 1 or like.padding_mode != "zeros":
            raise ValueError(f"only convolutions with groups=1, padded with zeros; got {like}")
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        shape, made = like.weight.shape, {"device": like.weight.device, "dtype": like.weight.dtype}
        self.weight = nn.Parameter(torch.empty(settings.experts, *shape, **made))
        self.threshold = nn.Parameter(torch.zeros(settings.experts, shape[0], **made))
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone())
        self.attention = Attention(shape[1], shape[0], settings).to(**made)
        self.register_buffer("frozen_masks", torch.ones(settings.experts, *shape[2:], **made))
        self.mask_mode: MaskMode = "none"
        for expert in self.weight.detach():
            if copy_weights:
                expert.copy_(like.weight.detach())
            else:
                nn.init.kaiming_uniform_(expert, nonlinearity="relu")

    def use_masks(self, mode: MaskMode) -> None:
        """Choose the masks; "frozen" keeps those of now, and thresholds are trained no more."""
        if mode == "frozen" and self.mask_mode != "frozen":
            self.frozen_masks.copy_(self.masks().detach())
        self.mask_mode = mode
        self.threshold.requires_grad_(mode != "frozen")

    def masks(self) -> Tensor:
        """The experts' masks, 0 or 1: [P, kh, kw]."""
        if self.mask_mode == "learned":
            return learned_masks(self.weight, self.threshold)
        return (
            self.frozen_masks if self.mask_mode == "frozen" else torch.ones_like(self.frozen_masks)
        )

    def masked_experts(self) -> Tensor:
        """M_p * W_p: [P, O, I, kh, kw]."""
        return self.weight * self.masks()[:, None, None]

    def union(self) -> Tensor:
        """The positions that any expert keeps, as booleans: [kh, kw]."""
        return self.masks().detach().bool().any(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W'], the batch as one convolution with a group per image."""
        batch, (out, into, *kernel) = x.shape[0], self.weight.shape[1:]
        kernels = torch.einsum("npo,poiyx->noiyx", self.attention(x), self.masked_experts())
        y = functional.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            kernels.reshape(batch * out, into, *kernel),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=batch,
        )
        y = y.reshape(batch, out, *y.shape[2:])
        return y if self.bias is None else y + self.bias[:, None, None]

    def get_extra_state(self) -> dict[str, str]:
        """For the state dict: which masks are used."""
        return {"mask_mode": self.mask_mode}

    def set_extra_state(self, state: dict[str, MaskMode]) -> None:
        """From a state dict."""
        self.mask_mode = state["mask_mode"]
        self.threshold.requires_grad_(self.mask_mode != "frozen")


def dpp_layers(model: nn.Module) -> dict[str, DPPConv2d]:
    """The layers of a network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DPPConv2d)}


def threshold_loss(model: nn.Module) -> Tensor:
    """Sum of exp(-t) over all thresholds: larger ones prune more, and cost less."""
    return torch.stack([torch.exp(-m.threshold).sum() for m in dpp_layers(model).values()]).sum()
