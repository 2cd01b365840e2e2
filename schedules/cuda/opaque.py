"""Operators that TVM lowers itself, on a GPU."""

from __future__ import annotations

from typing import Any

import tvm


def scheduled(function: Any) -> Any:
    """A lowered operator with its loops bound to blocks and threads, by TVM's rules."""
    from tvm.s_tir import dlight  # where it is needed: most networks have no such operator

    rules = (dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    module = tvm.IRModule({"main": function})
    with tvm.target.Target({"kind": "cuda", "arch": "sm_75", "max_threads_per_block": 1024}):
        return dlight.ApplyDefaultSchedule(*rules)(module)["main"]
