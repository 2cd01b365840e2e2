"""No two buffers share memory while both are needed."""

from __future__ import annotations

import pytest

from topiarist.compiler.choose import Chooser
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.light_models import light_model
from topiarist.compiler.lower import lower
from topiarist.compiler.memory import MemoryPlan, plan_memory
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Call, Program, Ref
from topiarist.compiler.simplify import simplify
from topiarist.targets import registry


def check(program: Program, memory: MemoryPlan) -> None:
    """Follow what each storage holds: every read finds what was written, outputs to the end."""
    holds: dict[int, str] = {}
    given = {ref.buffer for ref in program.inputs}

    def find(ref: Ref) -> None:
        if ref.buffer not in given:
            storage = memory.storage_of[ref.buffer]
            assert holds[storage] == ref.buffer, ref
            assert ref.bytes <= memory.sizes[storage]

    for call in program.calls:
        for ref in call.reads:
            find(ref)
        assert call.output.buffer not in given
        storage = memory.storage_of[call.output.buffer]
        read = {memory.storage_of[r.buffer] for r in call.reads if r.buffer not in given}
        accumulates = holds.get(storage) == call.output.buffer
        assert accumulates or storage not in read, call
        holds[storage] = call.output.buffer
        find(call.output)
    for ref in program.outputs:
        find(ref)


@pytest.mark.parametrize("name", ["shufflenet", "squeezenet", "inception_v1", "resnet50"])
def test_light_models(name: str) -> None:
    graph = simplify(extract_layers(import_model(light_model(name))))
    parts = Parts(registry.get("x86-avx512"), 1)
    chooser = Chooser(graph, parts, dense=True, mode="estimate", progress=lambda *_: None)
    program = lower(graph, chooser.plans()[0], parts)
    memory = plan_memory(program)
    check(program, memory)
    buffers = {ref.buffer: ref.bytes for call in program.calls for ref in (call.output,)}
    assert sum(memory.sizes) < 0.6 * sum(buffers.values())


def test_an_output_written_early_is_kept() -> None:
    x, a, b, c = (Ref(name, (16,)) for name in "xabc")
    calls = [Call("1", "f", (x, a)), Call("2", "f", (a, b)), Call("3", "f", (b, c))]
    program = Program((x,), calls=calls, outputs=(a, c))
    memory = plan_memory(program)
    check(program, memory)
    assert len(memory.sizes) == 3


def test_freed_storage_grows() -> None:
    x, a, b, c = Ref("x", (16,)), Ref("a", (16,)), Ref("b", (16,)), Ref("c", (99,))
    calls = [Call("1", "f", (x, a)), Call("2", "f", (a, b)), Call("3", "f", (b, c))]
    calls.append(Call("4", "f", (c, Ref("y", (4,)))))
    program = Program((x,), calls=calls, outputs=(Ref("y", (4,)),))
    memory = plan_memory(program)
    check(program, memory)
    assert sorted(memory.sizes) == [64, 64, 448]


def test_names_of_buffers_do_not_decide() -> None:
    """Two storages of one size become free at once: the order of a set of names is chance."""

    def storages(names: list[str]) -> list[int]:
        x, a, b, c, d, e = (Ref(name, (16,)) for name in names)
        calls = [
            *(Call("1", "f", (x, a)), Call("2", "f", (x, b)), Call("3", "g", (a, b, c))),
            *(Call("4", "f", (c, d)), Call("5", "g", (c, d, e))),
        ]
        memory = plan_memory(Program((x,), calls=calls, outputs=(e,)))
        return [memory.storage_of[name] for name in names[1:]]

    plans = {tuple(storages([f"{name}{i}" for name in "xabcde"])) for i in range(20)}
    assert len(plans) == 1
