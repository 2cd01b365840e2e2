"""A 64-bit ARM board under QEMU: TVM's server in an ARM Python, code linked for it here.

Needs the folder `build/arm64`, which docs/contributing.md says how to make.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiler.boards.conftest import network
from tests.compiler.test_worker import variants_of
from tests.cross import needs_compiler, needs_emulator
from tests.schedules.kernel_contract import CASES, make_problem
from topiarist.compiler.boards.doctor import examine
from topiarist.compiler.boards.link import BoardLimits, BoardOptions
from topiarist.compiler.boards.pool import Boards
from topiarist.compiler.worker import Layer
from topiarist.schedules.cpu.kernels import DirectDense, DirectSparse
from topiarist.schedules.kernel import ConvSite
from topiarist.targets import registry

ROOT = Path(__file__).parents[3]
ARM64 = ROOT / "build" / "arm64"
LIMITS = BoardLimits(connect=120.0, check=120.0, run=60.0)
TARGET = registry.get("rpi4")
assert TARGET.toolchain is not None
AARCH64 = TARGET.toolchain


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    """The command that starts Python as on a board."""
    if not (ARM64 / "root").is_dir():
        pytest.skip("there is no Python for ARM in build/arm64: see docs/contributing.md")
    paths = ":".join(str(p) for p in (ARM64 / "site", ROOT / "typing_links", ROOT))
    python = ARM64 / "root" / "usr" / "bin" / "python3.11"
    return [
        *(AARCH64.emulator, "-L", str(ARM64 / "root"), "-E", f"PYTHONPATH={paths}"),
        *("-E", "PYTHONDONTWRITEBYTECODE=1", str(python), "-P", "-m"),
    ]


@needs_compiler(AARCH64)
@needs_emulator(AARCH64)
def test_kernels_run_on_an_emulated_board(emulator: list[str]) -> None:
    problem = make_problem(CASES["density_0.3"], TARGET.lanes)
    layer = Layer(ConvSite(problem.workload, problem.views, TARGET), problem.weight, problem.bias)
    variants = variants_of(layer, DirectDense(), DirectSparse())
    with network() as net:
        board = ("tests.compiler.boards.bad_server", "emulated", str(net.port), "pi")
        net.run([*emulator, *board])
        net.wait_for(pi=1)
        options = BoardOptions(net.address, "pi", TARGET, limits=LIMITS)
        findings = list(examine(options))
        assert all(finding.ok for finding in findings), findings
        net.wait_for(pi=1)
        with Boards.find(options) as boards:
            outcomes = boards.measure(layer, variants).outcomes
            assert boards.board.architecture == "aarch64"
            assert boards.board.device_model == "Cortex-A72"
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
