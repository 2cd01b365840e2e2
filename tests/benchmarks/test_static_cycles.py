"""Loops are found in assembly; llvm-mca itself is not needed."""

from __future__ import annotations

import shutil

import pytest

from tests.benchmarks.static_cycles import MCA, NAME, Core, innermost

ASSEMBLY = f"""
other:
\tfmla\tv0.4s, v1.4s, v2.4s
{NAME}_compute_:
\tmov\tx0, #0
.LBB3_1:
\tldr\tq0, [x1]           // 16-byte Folded Reload
.LBB3_2:
\tldp\tq1, q2, [x2, #32]
\tfmla\tv0.4s, v1.4s, v3.s[0]
\tfmla\tv4.4s, v2.4s, v3.s[1]
\tsubs\tx3, x3, #1
\tb.ne\t.LBB3_2
\tstr\tq0, [x1]
\tcbz\tx4, .LBB3_4
\tb\t.LBB3_1
.LBB3_4:
\tfadd\tv0.4s, v1.4s, v2.4s
\tfsub\tv0.4s, v1.4s, v2.4s
\tsubs\tx3, x3, #1
\tb.ne\t.LBB3_4
\tret
.Lfunc_end3:
\tfmla\tv0.4s, v1.4s, v2.4s
"""


def test_innermost_loops_and_what_is_around_them() -> None:
    products, transforms = innermost(ASSEMBLY)
    assert products.sums == 2
    assert not products.transforms
    assert products.inner[0] == "ldp\tq1, q2, [x2, #32]"
    assert products.around[0] == "ldr\tq0, [x1]"
    assert [line.split("\t")[0] for line in products.around] == ["ldr", "str", "cbz", "b"]
    assert transforms.transforms
    assert transforms.sums == 0
    assert transforms.around == ()


@pytest.mark.skipif(shutil.which(MCA) is None, reason=f"needs {MCA}, of the package llvm-19")
def test_a_wider_core_takes_fewer_cycles() -> None:
    (loop, _) = innermost(ASSEMBLY)
    narrow, wide = (Core("aarch64", name) for name in ("cortex-a72", "neoverse-v1"))
    assert 0 < wide.cycles(loop.inner) <= narrow.cycles(loop.inner)
    assert wide.cycles(()) == 0
