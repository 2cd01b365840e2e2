"""Compiling from a log alone: nothing is measured, and what comes out is always the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.compiler.test_tune import two_convs
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.cli import app
from topiarist.compiler.cli_tune import parse_duration, parse_strategy
from topiarist.targets import registry
from topiarist.targets.detect import runs_here

ROOT = Path(__file__).parents[2]
TARGET = "x86-avx2"
WORKFLOW = ROOT / "docs" / "ci" / "compile.yml"

pytestmark = [
    pytest.mark.usefixtures("steady_machine"),
    pytest.mark.skipif(
        runs_here(registry.get(TARGET)) is not None, reason=str(runs_here(registry.get(TARGET)))
    ),
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, steady_machine: None) -> Path:
    """A folder with a model and a folder of logs from tuning it, as they would be in git."""
    folder = tmp_path_factory.mktemp("project")
    model = two_convs(folder / "model.onnx")
    log = folder / "tuning_logs"
    result = call("tune", model, "--target", TARGET, "--trials", 9, "--log", log, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["log"] == str(log / "x86.jsonl")
    assert report["measured"] > 0 and report["reused"] == 0 and report["finished"]
    assert report["network_us"] > 0
    assert {name for layer in report["layers"] for name in layer["layers"]} == {"first", "second"}
    return folder


def test_tuning_again_measures_nothing_and_says_so(project: Path) -> None:
    arguments = ("--target", TARGET, "--trials", 9, "--log", project / "tuning_logs")
    result = call("tune", project / "model.onnx", *arguments)
    assert result.exit_code == 0, result.output
    assert "0 candidates measured" in result.stdout
    assert "direct_" in result.stdout and "network" in result.stdout


def compiled(folder: Path, project: Path, hash_seed: str) -> dict[str, str]:
    """The hashes of a bundle's files, compiled in a process of its own."""
    folder.mkdir()
    for name in ("model.onnx", "tuning_logs"):
        (folder / name).symlink_to(project / name)
    arguments = ("--target", TARGET, "--strict", "--log", "tuning_logs", "-o", "model.topi")
    command = (sys.executable, "-m", "topiarist.compiler.cli", "compile", "model.onnx", *arguments)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = sorted((folder / "model.topi").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_model_and_log_give_the_same_bytes(project: Path, tmp_path: Path) -> None:
    """In different folders, with different orders of Python's sets."""
    first = compiled(tmp_path / "one", project, "1")
    assert set(first) == {"lib.so", "weights.bin", "manifest.json"}
    assert compiled(tmp_path / "two", project, "2") == first
    manifest = read_manifest(tmp_path / "one" / "model.topi")
    assert manifest.network_us is not None and manifest.others == ()  # as the log has them
    assert {layer.timed for layer in manifest.layers} == {"in network"}


def strict(project: Path, log: Path, out: Path, *more: object) -> Result:
    arguments = ("--target", TARGET, "--strict", "--log", log, "-o", out, *more)
    return call("compile", project / "model.onnx", *arguments)


def test_missing_records_and_broken_logs_differ(project: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = (project / "tuning_logs" / "x86.jsonl").read_text().splitlines(keepends=True)
    conv = [line for line in lines if '"out_channels":32' not in line]
    log.write_text("".join(conv))
    missing = strict(project, log, tmp_path / "m.topi")
    assert missing.exit_code == 3, missing.output
    assert "no record for 1 layer(s)" in missing.stderr and "second" in missing.stderr
    assert "first" not in missing.stderr and "fc" not in missing.stderr
    log.write_text("".join([*conv, "garbage\n", conv[0]]))
    broken = strict(project, log, tmp_path / "m.topi")
    assert broken.exit_code == 4, broken.output
    assert f"line {len(conv) + 1}" in broken.stderr
    log.write_text("nothing\nof a log\n")
    assert strict(project, log, tmp_path / "m.topi").exit_code == 4
    absent = strict(project, tmp_path / "absent.jsonl", tmp_path / "m.topi")
    assert absent.exit_code == 3 and "there is no tuning log" in absent.stderr
    assert not (tmp_path / "m.topi").exists()


def test_without_measuring_the_logs_decide_where_they_know_all(
    project: Path, tmp_path: Path
) -> None:
    arguments = (project / "model.onnx", "--target", TARGET, "--log", project / "tuning_logs")
    chosen = []
    for how in ("--strict", "--no-measure"):
        result = call("compile", *arguments, "-o", tmp_path / "m.topi", "--json", how)
        assert result.exit_code == 0, result.output
        chosen.append(json.loads(result.stdout)["layers"])
    assert chosen[0] == chosen[1]
    assert {layer["timed"] for layer in chosen[0]} == {"in network"}


def test_a_broken_line_that_is_not_needed_does_no_harm(project: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    whole = (project / "tuning_logs" / "x86.jsonl").read_text()
    log.write_text("garbage\n" + whole + whole[:200])
    assert strict(project, log, tmp_path / "m.topi").exit_code == 0


def test_records_of_other_threads_do_not_count(project: Path, tmp_path: Path) -> None:
    log = project / "tuning_logs"
    assert strict(project, log, tmp_path / "m.topi", "--threads", 2).exit_code == 3


def test_durations_and_strategies() -> None:
    assert [parse_duration(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for text in ("", "10", "m", "-3s", "0s", "1d"):
        with pytest.raises(ValueError, match="--budget takes"):
            parse_duration(text)
    assert parse_strategy("random") == "random"
    with pytest.raises(ValueError, match="--strategy takes model, random, evolution"):
        parse_strategy("luck")


def steps(workflow: str) -> dict[str, str]:
    """The scripts of a workflow's steps by name."""
    found = re.findall(
        r"- name: (.+)\n(?:.*\n)*?        run: \|\n((?:          .*\n|\n)+)", workflow
    )
    return {name: textwrap.dedent(script) for name, script in found}


def test_the_workflow_in_the_docs_does_what_it_says(project: Path, tmp_path: Path) -> None:
    """Its steps run here one after the other; pip and gh are told to do nothing."""
    text = WORKFLOW.read_text()
    scripts = steps(text)
    assert list(scripts) == ["Install", "Compile", "Check", "Latency table", "Comment"]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "pip": "exit 0",
        "gh": 'echo "$@" > comment.txt',
        "topiarist": f'exec "{sys.executable}" -m topiarist.compiler.cli "$@"',
        "python": f'exec "{sys.executable}" "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    settings = dict(re.findall(r"^  (MODEL|TARGET|LOG): (.+)$", text, re.M))
    environment = {
        **os.environ,
        **settings,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "NUMBER": "7",
    }
    for name in ("model.onnx", "tuning_logs"):
        (tmp_path / name).symlink_to(project / name)
    for name, script in scripts.items():
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    table = (tmp_path / "latency.md").read_text()
    assert re.search(r"\*\*\d+\.\d\d ms\*\* in 3 layers on x86-avx2, 1 thread\(s\)", table)
    assert "| first | direct_" in table and "| fc | " in table
    assert (tmp_path / "comment.txt").read_text().startswith("pr comment 7 ")
    assert (tmp_path / "summary.md").read_text() == table


def test_running_a_bundle_needs_no_xgboost() -> None:
    code = "import sys, topiarist.compiler.session; assert 'xgboost' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
