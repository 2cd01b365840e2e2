"""The demonstration's closing tables say what was measured; its stages run in order."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from topiarist.compiler import demo
from topiarist.compiler.bench import BenchResult, Ratio, Timing
from topiarist.compiler.compiled import LayerChoice
from topiarist.compiler.verify import VerifyResult
from topiarist.errors import BuildError


def _layer(name, run_us):
    return LayerChoice(
        layer=name,
        kind="conv",
        kernel="direct_sparse",
        config={},
        input_layout="",
        output_layout="",
        density=0.1,
        flops_dense=10_000_000,
        flops_nonzero=1_000_000,
        run_us=run_us,
        reason="fastest",
    )


def _timing(ms):
    return Timing(ms, ms - 1, ms + 1, runs=9, threads=1, version="1")


def _printed(table):
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def stages(monkeypatch):
    """Compile, verify and bench replaced by recorders; the model by a tiny one."""
    calls = []
    compiled = SimpleNamespace(layers=(_layer("[fast]", 20.0), _layer("slow", 50.0)))
    verified = VerifyResult(1e-3, 2e-6, 1.0, passed=True, samples=8, tolerance=1e-4)
    timed = BenchResult(
        engines={"topiarist": _timing(25.0), "ort": _timing(100.0)},
        ratio={"ort": Ratio(4.0, 3.9, 4.1)},
        rounds=9,
        threads=1,
        batch=1,
    )

    def compile_model(model, *, output, threads, progress):
        calls.append(("compile", model.name, threads))
        progress("choose", 3, 7)
        output.mkdir()
        (output / "weights.bin").write_bytes(bytes(2_000_000))
        return compiled

    def verify(bundle, model):
        calls.append(("verify", bundle.name, model.name))
        return verified

    def bench(bundle, model, against, *, threads, seconds):
        calls.append(("bench", model.name, against, threads, seconds))
        return timed

    monkeypatch.setattr(demo, "compile_model", compile_model)
    monkeypatch.setattr(demo, "verify", verify)
    monkeypatch.setattr(demo, "bench", bench)
    light = demo.light_model
    monkeypatch.setattr(demo, "light_model", lambda name, seed: light("squeezenet", seed))
    return calls


def test_the_stages_run_in_order(stages, tmp_path):
    steps = []
    result = demo.run_demo(tmp_path / "new", 0.1, 2.0, lambda *step: steps.append(step))
    assert stages == [
        ("compile", "resnet50_pruned.onnx", 1),
        ("verify", "resnet50.topi", "resnet50_pruned.onnx"),
        ("bench", "resnet50.onnx", ("ort",), 1, 2.0),
    ]
    assert ("choose", 3, 7) in steps
    text = _printed(demo.summary(result))
    for words in (
        "10.0% of pruned layers",
        "100.0 ms",
        "25.0 ms",
        "4.00x (95 % interval 3.90 to 4.10)",
        "2.0e-06",
        "2.0 MB",
    ):
        assert words in text


def test_the_slowest_layers_come_first():
    layers = [_layer("[fast]", 20.0), _layer("not timed", None), _layer("slow", 50.0)]
    text = _printed(demo.slowest_layers(layers))
    assert text.index("slow ") < text.index("[fast]")
    assert "not timed" not in text
    assert "20.0" in text  # 1 MFLOP in 50 us


def test_exit_codes(stages, tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--seconds", "1"]
    assert demo.main(arguments) == 0
    assert demo.main([*arguments, "--density", "2"]) == 2
    assert "got 2.0" in capsys.readouterr().out

    def fail(*args, **kwargs):
        raise BuildError("no compiler [found]")

    monkeypatch.setattr(demo, "compile_model", fail)
    assert demo.main(arguments) == 2
    assert "no compiler [found]" in capsys.readouterr().out
