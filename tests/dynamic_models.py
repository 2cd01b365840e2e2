"""Dynamic convolutions as ONNX, in the operators that DPPNet is exported in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.models import Net

FloatArray = NDArray[np.float32]


def draw_masks(
    rng: np.random.Generator, kernel: tuple[int, int], union: int, holders: int, experts: int = 4
) -> NDArray[np.bool_]:
    """Masks [P, kh, kw] of which so many positions are in the union, each in `holders` experts."""
    masks = np.zeros((experts, kernel[0] * kernel[1]), bool)
    for position in rng.permutation(masks.shape[1])[:union]:
        masks[rng.permutation(experts)[:holders], position] = True
    return masks.reshape(experts, *kernel)


def attention(net: Net, data: str, into: int, out: int, experts: int) -> str:
    """What each expert counts, [N, P, O], by the pooled input."""
    hidden = into // 4 + 1
    pooled = net.node("Flatten", net.node("GlobalAveragePool", data))
    squeezed = net.node("Relu", net.node("MatMul", pooled, net.weight(into, hidden)))
    logits = net.node(
        "Gemm", squeezed, net.weight(experts * out, hidden), net.weight(experts * out), transB=1
    )
    shape = net.constant(np.array([-1, experts, out]))
    return net.node("Softmax", net.node("Reshape", logits, shape), axis=1)


def dynamic_conv(
    net: Net,
    data: str,
    experts: FloatArray,
    size: tuple[int, int],
    *,
    shares: str = "",
    name: str = "",
    **attributes: Any,
) -> str:
    """sum_p shares[n, p, o] * conv(x[n], experts[p, o]), of `size` pixels; without a bias."""
    count, out, into, *kernel = experts.shape
    shares = shares or attention(net, data, into, out, count)
    spread = net.node("Reshape", shares, net.constant(np.array([-1, count, out, 1, 1])))
    flat = net.constant(experts.reshape(-1, into, *kernel), name and f"{name}.weight")
    outputs = net.node("Conv", data, flat, name=name, **attributes)
    shape = net.constant(np.array([-1, count, out, *size]))
    scaled = net.node("Mul", net.node("Reshape", outputs, shape), spread)
    return net.node("ReduceSum", scaled, net.constant(np.array([1])), keepdims=0)
