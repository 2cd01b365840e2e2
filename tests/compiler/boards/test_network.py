"""Real trackers and servers on the loopback: boards that work, die, hang and lie."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.compiler import bad_kernels
from tests.compiler.boards.conftest import Network, end_group, free_port, network, stopped
from tests.compiler.test_tune import two_convs
from tests.compiler.test_worker import layer_of, variants_of
from tests.schedules.kernel_contract import CASES
from topiarist.compiler.boards.doctor import Finding, examine
from topiarist.compiler.boards.link import BoardLimits, BoardOptions
from topiarist.compiler.boards.networks import OnBoards
from topiarist.compiler.boards.pool import Boards
from topiarist.compiler.boards.tracker import Tracker
from topiarist.compiler.cli import app
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.tune import TuneOptions, TuneStep, tune_model
from topiarist.errors import BoardError
from topiarist.schedules.cpu.kernels import DirectDense, DirectSparse
from topiarist.targets import registry
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

SHORT = BoardLimits(run=2.0)
FAULTS = ("old", "garbage", "full", "plain")


def options(net: Network, key: str, target: str = "host") -> BoardOptions:
    return BoardOptions(net.address, key, registry.get(target), 1, SHORT)


@pytest.fixture(scope="module")
def boards(net: Network) -> Network:
    """Two good boards, and one with each fault."""
    net.serve("good")
    net.serve("good")
    for fault in FAULTS:
        net.serve_badly(fault, fault)
    net.wait_for(good=2, **dict.fromkeys(FAULTS, 1))
    return net


def failure(findings: Iterator[Finding]) -> Finding:
    """The only thing that is wrong, which is found last."""
    *before, last = findings
    assert all(finding.ok for finding in before) and not last.ok
    return last


@pytest.mark.parametrize(
    ("fault", "what", "text"),
    [
        ("old", "versions", "apache-tvm 0.26.0, and here is"),
        ("garbage", "kernel", "computes wrong results"),
        ("full", "kernel", r"is full: of \d+ bytes it stored 4096"),
        ("plain", "connection", "is not topiarist's"),
    ],
)
def test_the_doctor_finds_a_fault_of_a_board(
    boards: Network, fault: str, what: str, text: str
) -> None:
    found = failure(examine(options(boards, fault)))
    assert (found.what, found.board[:10]) == (what, "127.0.0.1:")
    assert re.search(text, found.text)


def test_the_doctor_finds_boards_of_another_architecture(boards: Network) -> None:
    found = failure(examine(options(boards, "full", "rpi4")))
    assert found.what == "processor" and "rpi4 is 64-bit ARM and this" in found.text


def test_list_and_doctor(boards: Network) -> None:
    """And what the command line says of keys, boards in use, and things that are no tracker."""
    run = CliRunner().invoke
    where = ["--tracker", boards.text]
    listed = run(app, ["board", "list", *where])
    assert listed.exit_code == 0 and "garbage" in listed.output and "good" in listed.output
    unknown = run(app, ["board", "doctor", *where, "--key", "nobody"])
    assert unknown.exit_code == 1 and "FAILED  key" in unknown.output
    assert "'full', 'garbage', 'good', 'old', 'plain'" in unknown.output
    with Tracker(boards.address) as tracker:
        tracker.request("plain")  # and don't use it
        busy = run(app, ["board", "doctor", *where, "--key", "plain"])
    assert busy.exit_code == 1 and "none of them is free: 1 in use" in busy.output
    nowhere = run(app, ["board", "list", "--tracker", f"127.0.0.1:{free_port()}"])
    assert nowhere.exit_code == 2 and "nothing that listens" in nowhere.output
    nobody = run(app, ["board", "list", "--tracker", "no-such-host.invalid:9190"])
    assert nobody.exit_code == 2 and "there is no host 'no-such-host.invalid'" in nobody.output
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.1)
        port = other.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("topiarist.compiler.boards.tracker.ANSWER_S", 0.2)
            answer = run(app, ["board", "list", "--tracker", f"127.0.0.1:{port}"])
    assert answer.exit_code == 2 and "is no RPC tracker" in answer.output


def test_a_board_with_a_full_disk_has_no_outcomes(boards: Network) -> None:
    layer = layer_of(CASES["pointwise"])
    with (
        Boards.find(options(boards, "full")) as pool,
        pytest.raises(BoardError, match=r"no board is left.*left alone: the disk of the board"),
    ):
        pool.measure(layer, variants_of(layer, DirectDense()))


def test_two_boards_measure_and_outlive_bad_kernels(boards: Network) -> None:
    layer = layer_of(CASES["density_0.3"])
    kernels = (
        *(DirectDense(), bad_kernels.Crashing(), DirectSparse(), bad_kernels.Wrong()),
        *(bad_kernels.Unbuildable(), DirectSparse(), bad_kernels.Hanging(), DirectDense()),
    )
    variants = variants_of(layer, *kernels)
    with Boards.find(options(boards, "good")) as pool:
        outcomes = pool.measure(layer, variants).outcomes
        again = pool.measure(layer, variants[:1])
    assert [outcome.status for outcome in outcomes] == [
        "ok", "crash", "ok", "wrong_result", "build_error", "ok", "timeout", "ok"
    ]  # fmt: skip
    assert "ended the session" in outcomes[1].message
    assert "no end after 2 s of run" in outcomes[6].message
    assert all(bool(o.seconds) == (o.status == "ok") for o in outcomes)
    assert again.outcomes[0].status == "ok" and 0.2 < again.reference[0] < 5
    assert not pool.notes


def test_a_board_that_is_killed_and_one_that_hangs(boards: Network) -> None:
    """The first takes nothing with it; when the second is gone, too, that is an error."""
    layer = layer_of(CASES["pointwise"])
    variants = variants_of(layer, DirectDense(), DirectSparse())
    first, second = boards.serve("mortal"), boards.serve("mortal")
    boards.wait_for(mortal=2)
    short = BoardLimits(find=2.0, connect=2.0, prepare=3.0, upload=2.0, run=2.0)
    options = BoardOptions(boards.address, "mortal", registry.get("host"), 1, short)
    with Boards.find(options) as pool:
        pool.measure(layer, variants)
        end_group(first)
        left = pool.measure(layer, variants)
        assert [outcome.status for outcome in left.outcomes] == ["ok", "ok"]
        with stopped(second), pytest.raises(BoardError, match="no board is left"):
            pool.measure(layer, variants)
    assert len(pool.notes) == 2


@pytest.mark.usefixtures("steady_machine")
def test_tuned_on_boards_compiled_from_the_log(tmp_path: Path) -> None:
    """The tracker dies in the middle, which those who have their boards don't need any more."""
    model, log = two_convs(tmp_path / "two.onnx"), tmp_path / "log.jsonl"
    spec = registry.get("host")
    steps: list[TuneStep] = []
    with network() as net:
        net.serve("k", "--cores", "0")
        net.wait_for(k=1)

        def progress(step: TuneStep) -> None:
            steps.append(step)
            end_group(net.started[0])

        with Boards.find(BoardOptions(net.address, "k", spec)) as boards:
            where = OnBoards(boards)
            logs = TuningLogs(TuningLog(log))
            report = tune_model(
                *(model, spec, logs, boards, TuneOptions(trials=1)), where=where, progress=progress
            )
            device = where.device()
    assert report.measured and report.finished and report.network_us and steps
    records = list(TuningLog(log).read())
    assert {record.measured for record in records} == {"alone", "in network"}
    assert {record.input.target for record in records} == {device.key}
    assert device.key.cores == "generic 0" and device.key.device_model == spec.device_model
    # A log of records that name cores is for targets by name: this machine has all of its own.
    named = compile_model(model, target="x86-" + spec.isa, log=log, strict=True)
    assert all("in the log, in network" in layer.reason for layer in named.layers)
