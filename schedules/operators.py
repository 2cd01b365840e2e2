"""The kernels of all layers but convolutions, for CPUs and for GPUs.

Both have modules with functions of the same names, arguments and results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from topiarist.schedules.cpu import elementwise, linear, pooling, relayout
from topiarist.schedules.cuda import elementwise as cuda_elementwise
from topiarist.schedules.cuda import linear as cuda_linear
from topiarist.schedules.cuda import opaque
from topiarist.schedules.cuda import pooling as cuda_pooling
from topiarist.schedules.cuda import relayout as cuda_relayout
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class Operators:
    """One module each; `scheduled` makes TVM's own lowering of an operator fit the device."""

    elementwise: ModuleType
    linear: ModuleType
    pooling: ModuleType
    relayout: ModuleType
    scheduled: Callable[[Any], Any]


CPU = Operators(elementwise, linear, pooling, relayout, lambda function: function)
CUDA = Operators(cuda_elementwise, cuda_linear, cuda_pooling, cuda_relayout, opaque.scheduled)


def operators_for(target: TargetSpec) -> Operators:
    """Those that run on a target."""
    return CPU if target.gpu is None else CUDA
