"""Layers with their kernels and layouts -> the program of kernel calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax
from tvm_ffi import structural_hash

from topiarist.compiler.choose import (
    Plan,
    conv_views,
    linear_function,
    linear_params,
    linear_shape,
    move,
)
from topiarist.compiler.graph import (
    Activation,
    Add,
    Affine,
    Concat,
    Conv,
    DynamicConv,
    GlobalPool,
    Graph,
    Linear,
    Node,
    Opaque,
    Pool,
    Subsample,
    View,
)
from topiarist.compiler.layouts import Place
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Call, Program, Ref
from topiarist.errors import ModelError
from topiarist.schedules.cpu import mix, pooling, relayout
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.kernels import conv_kernel
from topiarist.schedules.layout import PlainLayout
from topiarist.schedules.layout import View as ChannelView


def lower(graph: Graph, plan: Plan, parts: Parts) -> Program:
    """Emit every layer, with the moves between layouts that its readers need."""
    return _Lowering(graph, plan, parts).run()


def _bounds(activation: Activation | None) -> tuple[float | None, float | None]:
    return (None, None) if activation is None else (activation.low, activation.high)


class _Lowering:
    def __init__(self, graph: Graph, plan: Plan, parts: Parts) -> None:
        self.graph = graph
        self.plan = plan
        self.parts = parts
        self.threads = parts.threads
        self.made = parts.operators
        self.alias: dict[str, str] = {}  # value -> the value whose buffer it shares
        self.copied: set[str] = set()
        inputs = tuple(self._plain_ref(name) for name in graph.inputs)
        self.program = Program(inputs)

    def run(self) -> Program:
        for node in self.graph.nodes:
            for place in self.plan.layouts.reads[node.name]:
                self._ensure_copy(place)
            self._emit(node)
        self.program.outputs = tuple(self._output(name) for name in self.graph.outputs)
        return self.program

    def _emit(self, node: Node) -> None:
        emitters: dict[type[Node], Callable[[Any], None]] = {
            Conv: self._conv,
            DynamicConv: self._conv,
            Linear: self._linear,
            Pool: self._pool,
            Subsample: self._subsample,
            GlobalPool: self._global_pool,
            Add: self._add,
            Affine: self._affine,
            Concat: self._concat,
            View: self._view,
            Opaque: self._opaque,
        }
        emitters[type(node)](node)

    def _function(self, key: Any, label: str, make: Callable[[str], Any]) -> str:
        return self._use(self.parts.function(key, label, make))

    def _use(self, name: str) -> str:
        """Make the function part of the program."""
        self.program.functions[name] = self.parts.functions[name]
        return name

    def _call(self, layer: str, function: str, *args: Ref | NDArray[Any]) -> None:
        program = self.program
        packed = tuple(a if isinstance(a, Ref) else program.parameter(a) for a in args)
        program.calls.append(Call(layer, function, packed))

    def _batch(self, value: str) -> int:
        return self.graph.values[value].shape[0]

    def _plain_ref(self, value: str) -> Ref:
        v = self.graph.values[value]
        return Ref(self._buffer(value), v.shape, v.dtype)

    def _buffer(self, value: str) -> str:
        while value in self.alias:
            value = self.alias[value]
        return value

    def _flat(self, place: Place, value: str) -> Ref:
        """The place's whole buffer as a flat tensor."""
        if isinstance(place.view, PlainLayout):
            dtype = self.graph.values[value].dtype
            return Ref(self._buffer(place.buffer), (place.view.size,), dtype)
        return Ref(place.buffer, (self._batch(value) * place.view.layout.size,))

    def _reads(self, node: Node) -> list[tuple[Place, Ref]]:
        places = self.plan.layouts.reads[node.name]
        return [
            (place, self._flat(place, name))
            for place, name in zip(places, node.inputs, strict=True)
        ]

    def _writes(self, node: Node) -> tuple[Place, Ref]:
        place = self.plan.layouts.places[node.output]
        return place, self._flat(place, node.output)

    def _ensure_copy(self, place: Place) -> None:
        copy = self.plan.layouts.copies.get(place.buffer)
        if copy is None or place.buffer in self.copied:
            return
        self.copied.add(place.buffer)
        self._move(copy.value, place)

    def _move(self, value: str, to: Place) -> None:
        source = self.plan.layouts.places[value]
        batch = self._batch(value)
        name, tables = move(self.parts, source.view, to.view, batch)
        self._use(name)
        layout = to.view.layout if isinstance(to.view, ChannelView) else to.view
        self._call(
            f"{value} to {layout}", name, self._flat(source, value), *tables, self._flat(to, value)
        )

    def _conv(self, node: Conv) -> None:
        choice = self.plan.choices[node.name].chosen
        assert choice.config is not None
        kernel, config = conv_kernel(choice.kernel), choice.config
        views = conv_views(node, self.plan.layouts)
        site = self.parts.site(self.plan.workloads[node.name], views)
        name = self._use(self.parts.convolution(kernel, site, config, node.weight))
        reads = self._reads(node)
        residual = reads[node.residual_at :]
        weight = node.experts if isinstance(node, DynamicConv) and kernel.mixes else node.weight
        packed: list[Ref | NDArray[Any]] = [
            *self.parts.constants(
                (node.name, kernel.name, config, views), lambda: kernel.pack(site, config, weight)
            )
        ]
        if isinstance(node, DynamicConv):
            shares = _flat(reads[1][1])
            if kernel.mixes:
                packed[-1] = shares
            else:
                packed[0] = self._mixed(node, site, config, packed, shares)
        refs = [] if views.in_place else [ref for _, ref in residual]
        y = self._writes(node)[1]
        self._call(node.name, name, reads[0][1], *packed, node.bias, *refs, y)

    def _mixed(
        self,
        node: DynamicConv,
        site: ConvSite,
        config: Any,
        packed: Sequence[Any],
        shares: Ref,
    ) -> Ref:
        """Mix the nonzeros of all images, in the convolution's order."""
        values, _, starts, order = packed
        (experts,) = self.parts.constants(
            (node.name, "mix", config, site.views),
            lambda: [mix.pack_experts(site, config, node.experts, node.weight)],
        )
        shape, lanes = mix.MixShape.of(site, config, len(node.experts)), self.parts.target.lanes
        name = self._function(
            ("mix", shape, lanes),
            "mix",
            lambda name: mix.mix_prim_func(name, shape, lanes, self.threads),
        )
        mixed = Ref(f"{node.output}@kernels", values.shape)
        self._call(node.name, name, shares, experts, starts, order, mixed)
        return mixed

    def _linear(self, node: Linear) -> None:
        choice = self.plan.choices[node.name].chosen
        shape = linear_shape(node, self._batch(node.inputs[0]))
        name = self._use(linear_function(self.parts, choice.kernel, shape))
        params = self.parts.constants(
            (node.name, choice.kernel), lambda: linear_params(self.parts, choice.kernel, node)
        )
        self._call(node.name, name, self._reads(node)[0][1], *params, self._writes(node)[1])

    def _pool(self, node: Pool) -> None:
        (place, x), (target, y) = self._reads(node)[0], self._writes(node)
        batch, source, to = self._batch(node.output), place.view, target.view
        assert isinstance(source, ChannelView) and isinstance(to, ChannelView)
        name = self._function(
            (node.mode, source, to, node.kernel, node.strides, node.padding, batch),
            f"{node.mode}_pool",
            lambda name: self.made.pooling.pool_prim_func(
                name,
                node.mode,
                source,
                to,
                kernel=node.kernel,
                strides=node.strides,
                padding=node.padding[:2],
                batch=batch,
                threads=self.threads,
            ),
        )
        scale: list[NDArray[Any]] = []
        if node.mode == "avg":
            height, width = self.graph.values[node.inputs[0]].shape[2:]
            scale = [
                pooling.average_scale(
                    to.layout,
                    height,
                    width,
                    kernel=node.kernel,
                    strides=node.strides,
                    padding=node.padding,
                    count_include_pad=node.count_include_pad,
                )
            ]
        self._call(node.name, name, x, *scale, y)

    def _subsample(self, node: Subsample) -> None:
        (place, x), (target, y) = self._reads(node)[0], self._writes(node)
        source, to, batch = place.view, target.view, self._batch(node.output)
        assert isinstance(to, ChannelView)
        if _in_step(source, to, node.strides):
            assert isinstance(source, ChannelView)
            name = self._function(
                ("pick", source, to, node.strides, batch),
                "pick",
                lambda name: self.made.pooling.pool_prim_func(
                    name,
                    "max",
                    source,
                    to,
                    kernel=(1, 1),
                    strides=node.strides,
                    padding=(0, 0),
                    batch=batch,
                    threads=self.threads,
                ),
            )
            self._call(node.name, name, x, y)
            return
        name = self._function(
            ("gather", source, to, batch),
            "gather",
            lambda name: self.made.relayout.to_lanes_prim_func(
                name, source, to, batch=batch, threads=self.threads
            ),
        )
        layout = source.layout if isinstance(source, ChannelView) else source
        tables = relayout.to_lanes_tables(layout, to.layout, node.strides)
        self._call(node.name, name, x, *tables, y)

    def _global_pool(self, node: GlobalPool) -> None:
        (place, x), (_, y) = self._reads(node)[0], self._writes(node)
        view, batch = place.view, self._batch(node.output)
        if isinstance(view, PlainLayout):  # one pixel: its own mean
            self.alias[node.output] = node.inputs[0]
            return
        name = self._function(
            ("global", view, batch),
            "global_average",
            lambda name: self.made.pooling.global_average_prim_func(
                name, view, batch=batch, threads=self.threads
            ),
        )
        self._call(node.name, name, x, y)

    def _add(self, node: Add) -> None:
        (a_place, a), (b_place, b) = self._reads(node)
        target, y = self._writes(node)
        bounds = _bounds(node.activation)
        views = [p.view for p in (a_place, b_place, target)]
        lanes = [view for view in views if isinstance(view, ChannelView)]
        batch = self._batch(node.output)
        if len(lanes) == 3:
            make: Callable[[str], Any] = lambda name: self.made.elementwise.add_prim_func(  # noqa: E731
                name, *lanes, activation=bounds, batch=batch, threads=self.threads
            )
        else:
            layout = PlainLayout(self.graph.values[node.output].shape)
            make = lambda name: self.made.elementwise.plain_add_prim_func(  # noqa: E731
                name, layout, activation=bounds
            )
        name = self._function(("add", tuple(views), bounds, batch), "add", make)
        self._call(node.name, name, a, b, y)

    def _affine(self, node: Affine) -> None:
        (place, x), (target, y) = self._reads(node)[0], self._writes(node)
        scaled = node.scale is not None
        bounds, batch = _bounds(node.activation), self._batch(node.output)
        source, to = place.view, target.view
        if isinstance(source, ChannelView) and isinstance(to, ChannelView):
            name = self._affine_function(source, to, scaled, bounds, batch)
        else:
            layout = PlainLayout(self.graph.values[node.output].shape)
            name = self._function(
                ("plain affine", layout, scaled, bounds),
                "affine",
                lambda name: self.made.elementwise.plain_affine_prim_func(
                    name, layout, scaled=scaled, activation=bounds
                ),
            )
        params = [array for array in (node.scale, node.shift) if array is not None]
        self._call(node.name, name, x, *params, y)

    def _affine_function(
        self,
        source: ChannelView,
        to: ChannelView,
        scaled: bool,
        bounds: tuple[float | None, float | None],
        batch: int,
    ) -> str:
        return self._function(
            ("affine", source, to, scaled, bounds, batch),
            "affine",
            lambda name: self.made.elementwise.affine_prim_func(
                name,
                source,
                to,
                scaled=scaled,
                activation=bounds,
                batch=batch,
                threads=self.threads,
            ),
        )

    def _concat(self, node: Concat) -> None:
        """Copy the parts that their layers could not write in place."""
        target, y = self._writes(node)
        assert isinstance(target.view, ChannelView)
        first, batch = target.view.first, self._batch(node.output)
        for (place, x), value in zip(self._reads(node), node.inputs, strict=True):
            count = self.graph.values[value].shape[1]
            part = ChannelView(target.view.layout, first, count)
            first += count
            if self.plan.layouts.places[value] == Place(target.buffer, part):
                continue
            assert isinstance(place.view, ChannelView)
            name = self._affine_function(place.view, part, False, (None, None), batch)
            self._call(node.name, name, x, y)

    def _view(self, node: View) -> None:
        place = self.plan.layouts.reads[node.name][0]
        self.alias[node.output] = place.buffer

    def _opaque(self, node: Opaque) -> None:
        """Run TVM's own lowering of the operator on row-major tensors."""
        steps, constants = _legalise(node)
        refs: dict[str, Ref] = {}
        places = self.plan.layouts.reads[node.name]
        for variable, value, place in zip(node.arguments, node.inputs, places, strict=True):
            shape, dtype = self.graph.values[value].shape, self.graph.values[value].dtype
            refs[variable.name] = Ref(self._buffer(place.buffer), shape, dtype)
        for i, (function, args, (shape, dtype)) in enumerate(steps):
            last = i == len(steps) - 1
            buffer = node.output if last else f"{node.name}#{i}"
            out = Ref(buffer, shape, dtype)
            refs[f"step {i}"] = out
            name = self._function(
                ("opaque", node.name, i, structural_hash(function)),
                "opaque",
                functools.partial(self.made.scheduled(function).with_attr, "global_symbol"),
            )
            inputs = [refs[arg] if arg in refs else constants[arg] for arg in args]
            self._call(node.name, name, *inputs, out)

    def _output(self, value: str) -> Ref:
        place = self.plan.layouts.places[value]
        shape, dtype = self.graph.values[value].shape, self.graph.values[value].dtype
        buffer = f"{value}@output"
        if isinstance(place.view, PlainLayout):
            ref = Ref(self._buffer(place.buffer), shape, dtype)
            given = {r.buffer for r in self.program.inputs}
            return self._copied(ref, buffer) if ref.buffer in given else ref
        self._move(value, Place(buffer, PlainLayout(shape)))
        return Ref(buffer, shape, dtype)

    def _copied(self, ref: Ref, buffer: str) -> Ref:
        """An output that is an input: the caller's memory is not ours to return."""
        if ref.dtype != "float32":
            raise ModelError(
                f"The model returns its {ref.dtype} input {ref.buffer!r} unchanged, and topiarist "
                "copies float32 only. Export the model without this output."
            )
        size = int(np.prod(ref.shape))
        name = self._function(
            ("copy", size),
            "copy",
            lambda name: self.made.elementwise.plain_affine_prim_func(
                name, PlainLayout((1, size)), scaled=False, activation=(None, None)
            ),
        )
        self._call(f"{ref.buffer} copied", name, Ref(ref.buffer, (size,)), Ref(buffer, (size,)))
        return Ref(buffer, ref.shape)


def _flat(ref: Ref) -> Ref:
    return replace(ref, shape=(math.prod(ref.shape),))


def _in_step(source: ChannelView | PlainLayout, to: ChannelView, strides: tuple[int, int]) -> bool:
    """Whether the vectors of `to` are every so-many vectors of the source."""
    if isinstance(source, PlainLayout):
        return False
    a, b = source.layout.grid, to.layout.grid
    return (a.sy, a.sx, a.rows, a.cols) == (b.sy, b.sx, b.rows * strides[0], b.cols * strides[1])


Step = tuple[Any, list[str], tuple[tuple[int, ...], str]]


def _renamed(expression: Any, variables: dict[str, Any]) -> Any:
    """A call with other variables for its own, by their names."""
    if isinstance(expression, relax.Var):
        return variables[expression.name]
    if isinstance(expression, relax.Tuple):
        return relax.Tuple([_renamed(field, variables) for field in expression.fields])
    if isinstance(expression, relax.Call):
        args = [_renamed(arg, variables) for arg in expression.args]
        return relax.Call(expression.op, args, expression.attrs, expression.ty_args)
    return expression


def _legalise(node: Opaque) -> tuple[list[Step], dict[str, NDArray[Any]]]:
    """(function, argument names, output shape and dtype) of each call, and the constants.

    Arguments are named by their Relax variable, "step i" for the result of step i.
    """
    params = {v.name: v for v in node.arguments}
    # TVM writes the names of variables into CUDA source as they are, and the model's are anything.
    plain = {name: relax.Var(f"input_{i}", params[name].ty) for i, name in enumerate(params)}
    builder = relax.BlockBuilder()
    with builder.function("main", list(plain.values())):
        builder.emit_func_output(builder.emit(_renamed(node.call, plain)))
    module = relax.transform.LegalizeOps()(builder.get())
    names: dict[str, str] = {variable.name: name for name, variable in plain.items()}
    steps: list[Step] = []
    constants: dict[str, NDArray[Any]] = {}
    for binding_block in module["main"].body.blocks:
        for binding in binding_block.bindings:
            call = binding.value
            if isinstance(call, relax.Var):
                names[binding.var.name] = names[call.name]
                continue
            if call.op.name != "relax.call_tir":
                raise ModelError(
                    f"{node.name}: the operator {node.call.op.name} has no lowering in TVM; "
                    "remove it from the model, or replace it by supported ones"
                )
            args = []
            for arg in call.args[1].fields:
                if isinstance(arg, relax.Var):
                    args.append(names[arg.name])
                else:
                    key = f"constant {len(constants)}"
                    constants[key] = arg.value.numpy()
                    args.append(key)
            names[binding.var.name] = f"step {len(steps)}"
            shape = tuple(int(d) for d in binding.var.ty.shape)
            steps.append((module[call.args[0]], args, (shape, str(binding.var.ty.dtype))))
    return steps, constants
