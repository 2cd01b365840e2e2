"""Which Relax variable is which layer of the model; kept as attributes of the main function."""

from __future__ import annotations

from typing import Any

import tvm

_LAYERS = "topiarist.layer_names"
_OUTPUTS = "topiarist.output_names"


def layer_names(function: Any) -> dict[str, str]:
    """Relax variable name -> name of the ONNX node that it is the result of."""
    found = function.attrs.get(_LAYERS) if function.attrs else None
    return {str(k): str(v) for k, v in found.items()} if found else {}


def output_names(function: Any) -> list[str]:
    """Names of the function's results, as the ONNX model has them."""
    found = function.attrs.get(_OUTPUTS) if function.attrs else None
    return [str(name) for name in found] if found else []


def with_layer_names(module: tvm.IRModule, names: dict[str, str]) -> tvm.IRModule:
    """The module with the given variable names in place of those it had."""
    return _with_attribute(module, _LAYERS, names)


def with_output_names(module: tvm.IRModule, names: list[str]) -> tvm.IRModule:
    """The module with the given names for its results."""
    return _with_attribute(module, _OUTPUTS, names)


def _with_attribute(module: tvm.IRModule, key: str, value: object) -> tvm.IRModule:
    changed = module.clone()
    changed["main"] = module["main"].with_attr(key, value)
    return changed
