"""The trial takes what its clock says is fastest in the network, not what was fastest alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.models import Net
from topiarist.compiler.choose import Candidate, Choice, Chooser, Plan, conv_views
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Graph
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program
from topiarist.compiler.simplify import simplify
from topiarist.compiler.trial import Seconds, Trial, settle
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets import registry

Clock = Callable[[str], float]


def nothing(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def two_layers() -> tuple[Graph, Parts, Plan]:
    """Two different convolutions; each has its dense kernel and a slower one as finalists."""
    net = Net()
    x = net.conv(net.input(1, 8, 8, 8), 8, 8, name="first")
    model = net.model(net.conv(x, 12, 8, 1, name="second"))
    graph = simplify(extract_layers(import_model(model)))
    parts = Parts(registry.get("host"), 1)
    (plan,) = Chooser(graph, parts, dense=True, mode="estimate", progress=nothing).plans()
    choices = {}
    for name, choice in plan.choices.items():
        config = choice.chosen.config
        assert config is not None
        other = Candidate(choice.chosen.kernel, replace(config, out_block=1), 11.0)
        slow = replace(other, run_us=99.0)
        choices[name] = Choice(
            replace(choice.chosen, run_us=10.0), (replace(choice.chosen, run_us=10.0), other, slow)
        )
    return graph, parts, replace(plan, choices=choices)


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_the_clock_decides(
    two_layers: tuple[Graph, Parts, Plan], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the network the second finalist of the first layer takes `seconds`, all else 2 s."""
    graph, parts, plan = two_layers
    compared = []

    def compare(trial: Trial, programs: list[Program]) -> list[Seconds]:
        compared.append(len(programs))
        functions = [[call.function for call in program.calls] for program in programs]
        base = functions[0]
        return [
            np.array([
                seconds if call.layer == "first" and name != base[i] else 2.0
                for i, (call, name) in enumerate(zip(program.calls, names, strict=True))
            ])
            for program, names in zip(programs, functions, strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(Trial, "compare", compare)
    settled, program = settle(graph, [plan], parts, nothing)
    assert compared == [2, 1]  # what is far slower alone is not tried
    first = plan.choices["first"].timed
    wanted = first[1] if seconds < 2 else first[0]
    assert settled.choices["first"].chosen.config == wanted.config
    assert settled.choices["first"].chosen.run_us == pytest.approx(min(seconds, 2.0) * 1e6)
    assert settled.choices["second"].chosen.config == plan.choices["second"].timed[0].config
    assert {call.layer for call in program.calls} >= {"first", "second"}


def test_the_fastest_of_another_tile_is_a_finalist(
    two_layers: tuple[Graph, Parts, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four configurations of one tile are faster alone, another tile is within reach."""
    graph, parts, plan = two_layers
    best = plan.choices["first"].timed[0]
    assert isinstance(best.config, DirectConfig)
    others = [replace(best.config, in_block=n) for n in (1, 2, 4)]
    tile = replace(best.config, rows=1, cols=1)
    timed = [best, *(Candidate(best.kernel, c, 11.0) for c in others)]
    timed += [Candidate(best.kernel, tile, 12.0), Candidate(best.kernel, tile, 13.0)]
    choices = {**plan.choices, "first": Choice(best, tuple(timed))}
    tried: list[set[str]] = []

    def compare(trial: Trial, programs: list[Program]) -> list[Seconds]:
        layers = [next(c for c in p.calls if c.layer == "first").function for p in programs]
        tried.append(set(layers))
        return [np.ones(len(program.calls)) for program in programs]

    monkeypatch.setattr(Trial, "compare", compare)
    wanted = [best.config, *others[:2], tile]
    settle(graph, [replace(plan, choices=choices)], parts, nothing)
    node = next(node for node in graph.nodes if node.name == "first")
    assert isinstance(node, Conv)
    site = parts.site(plan.workloads["first"], conv_views(node, plan.layouts))
    kernel = conv_kernel(best.kernel)
    assert tried[0] == {parts.convolution(kernel, site, c, node.weight) for c in wanted}


def test_real_times(two_layers: tuple[Graph, Parts, Plan]) -> None:
    graph, parts, plan = two_layers
    settled, program = settle(graph, [plan, plan], parts, nothing)
    assert settled.total_us > 0
    assert settled.network_us == settled.total_us == pytest.approx(sum(settled.calls_us))
    assert len(settled.calls_us) == len(program.calls)
    assert all(choice.chosen.run_us > 0 for choice in settled.choices.values())
    assert program.outputs
