"""From the program to a TVM executable: Relax with explicit memory, then machine code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax

from topiarist.compiler.gpu_code import use_compiler
from topiarist.compiler.memory import MemoryPlan
from topiarist.compiler.program import Program, Ref
from topiarist.errors import BuildError
from topiarist.targets.spec import TargetSpec


def to_relax(program: Program, memory: MemoryPlan, *, graphs: bool = False) -> tvm.IRModule:
    """One impure function `main(inputs..., params)` that calls the kernels in order.

    With `graphs` the types of the parameters are known, which CUDA graphs need. They would be
    checked in every run, which takes longer than many a kernel, so elsewhere they are not.
    """
    builder = relax.BlockBuilder()
    functions = {
        name: builder.add_func(function, name) for name, function in program.functions.items()
    }
    inputs = [
        relax.Var(f"input_{i}", relax.TensorType(ref.shape, ref.dtype))
        for i, ref in enumerate(program.inputs)
    ]
    types = [relax.TensorType(array.shape, array.dtype.name) for array in program.params]
    params = relax.Var("params", relax.TupleType(types) if graphs else relax.AnyType())
    with builder.function("main", [*inputs, params], pure=False):
        emitter = _Emitter(builder, program, memory, inputs, params, types)
        for call in program.calls:
            args = [emitter.argument(arg) for arg in call.args]
            builder.emit(relax.Call(functions[call.function], args, None, [relax.TupleType([])]))
        outputs = [emitter.tensor(ref) for ref in program.outputs]
        result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
        builder.emit_func_output(result)
    return builder.get()


class _Emitter:
    """Makes storages and tensors as they are needed."""

    def __init__(
        self,
        builder: Any,
        program: Program,
        memory: MemoryPlan,
        inputs: list[Any],
        params: Any,
        types: Sequence[Any],
    ) -> None:
        self.builder = builder
        self.memory = memory
        self.params = params
        self.types = types
        self.storages: dict[int, Any] = {}
        self.tensors: dict[Ref, Any] = {}
        self.constants: dict[int, Any] = {}
        self.given: dict[str, Any] = {}
        for ref, variable in zip(program.inputs, inputs, strict=True):
            self.tensors[ref] = variable
            self.given[ref.buffer] = variable

    def argument(self, arg: Ref | int) -> Any:
        if isinstance(arg, Ref):
            return self.tensor(arg)
        if arg not in self.constants:
            self.constants[arg] = self.builder.emit(self._parameter(arg))
        return self.constants[arg]

    def _parameter(self, index: int) -> Any:
        if isinstance(self.params.ty, relax.TupleType):
            return relax.TupleGetItem(self.params, index)
        getitem = relax.ExternFunc("vm.builtin.tuple_getitem")
        return relax.Call(
            getitem, [self.params, relax.prim_value(index)], None, [self.types[index]]
        )

    def tensor(self, ref: Ref) -> Any:
        if ref not in self.tensors:
            shape = relax.ShapeExpr(list(ref.shape))
            if ref.buffer in self.given:
                made = relax.op.reshape(self.given[ref.buffer], shape)
            else:
                storage = self._storage(self.memory.storage_of[ref.buffer])
                made = relax.op.memory.alloc_tensor(storage, 0, shape, ref.dtype)
            self.tensors[ref] = self.builder.emit(made)
        return self.tensors[ref]

    def _storage(self, index: int) -> Any:
        if index not in self.storages:
            size = relax.ShapeExpr([self.memory.sizes[index]])
            self.storages[index] = self.builder.emit(
                relax.op.memory.alloc_storage(size, 0, "global", "uint8")
            )
        return self.storages[index]


def build(module: tvm.IRModule, target: TargetSpec) -> Any:
    """Compile the lowered module. Raises BuildError with TVM's message."""
    passes = [
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
    graphs = target.gpu is not None
    if graphs:
        passes.insert(0, relax.transform.RewriteCUDAGraph())
        module = _inputs_only_vary(module)
    use_compiler(target)
    try:
        with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": graphs}):
            return relax.build(
                module,
                target=tvm.target.Target(target.tvm_target),
                relax_pipeline=tvm.transform.Sequential(passes),
                # An interpreter between the kernels takes longer than many a kernel.
                exec_mode="bytecode" if graphs else "compiled",
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise BuildError(f"TVM could not build the network for {target.name}: {error}") from error


def _inputs_only_vary(module: tvm.IRModule) -> tvm.IRModule:
    """The module, with `main` told to have its parameters always at the same addresses.

    All calls but those that read an input or write an output then become one launch of a graph.
    """
    main = module["main"]
    module = module.clone()
    name = module.get_global_var("main")
    module.update_func(name, main.with_attr("num_input", len(main.params) - 1))
    return module
