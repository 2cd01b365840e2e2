"""How precisely layers multiply: what the user allows, and what a target can do."""

from __future__ import annotations

from typing import Literal, get_args

from topiarist.errors import TargetError
from topiarist.targets.spec import TargetSpec

Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def parse_precision(text: str) -> Precision:
    """The precision of that name. Raises ValueError for another."""
    for precision in PRECISIONS:
        if precision == text:
            return precision
    raise ValueError(f"--precision takes {' or '.join(PRECISIONS)}, got {text!r}")


def require_precision(precision: Precision, target: TargetSpec) -> None:
    """Raise TargetError where a target has nothing that multiplies so."""
    if precision == "fp16" and (target.gpu is None or not target.gpu.multiplies_half):
        raise TargetError(
            f"{target.name} has no kernels that multiply in fp16, only GPUs from sm_80 on have: "
            "leave --precision out"
        )
