"""Inline PTX as C++: the few instructions that kernels use, as NVIDIA's manual defines them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

_ASM = re.compile(r'asm(?: volatile)?\(\s*((?:"[^"]*"\s*)+):([^:;]*)(?::([^:;]*))?\);')
_OPERAND = re.compile(r'"[^"]+"\((.*?)\)(?=,\s*"|\s*$)')
_IMMEDIATE = re.compile(r"\b0f([0-9a-fA-F]{8})\b")
_TYPES = {"f32": "float", "b64": "const char*"}
# What an instruction does, with its operands by number.
_INSTRUCTIONS = {
    "cvta.to.global.u64": "{0} = (const char*)({1});",
    "ld.global.nc.f32": "{0} = *(const float*)({1});",
    "fma.rn.f32": "{0} = __builtin_fmaf({1}, {2}, {3});",
    "cvt.rn.satfinite.f16x2.f32": "{0} = tensor::as_half({1}) << 16 | tensor::as_half({2});",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (
        "tensor::dense({0}, {1}, {2}, {3}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, "
        "{{{10}, {11}, {12}, {13}}});"
    ),
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32": (
        "tensor::sparse({0}, {1}, {2}, {3}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}, {10}, {11}}}, "
        "{{{12}, {13}, {14}, {15}}}, {16}, {17});"
    ),
}


def in_c(source: str) -> str:
    """CUDA source with every asm statement as a block of C++."""
    return _ASM.sub(_statement, source)


def _statement(asm: re.Match[str]) -> str:
    text = "".join(re.findall('"([^"]*)"', asm[1]))
    operands = [_OPERAND.findall(part.strip()) for part in (asm[2], asm[3] or "")]
    return "{" + "\n".join(_lines(text, [*operands[0], *operands[1]])) + "}"


def _lines(text: str, operands: list[str]) -> Iterator[str]:
    """An instruction a line."""
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):  # a block
        text = text[1:-1]
    for instruction in filter(None, (part.strip() for part in text.split(";"))):
        name, *rest = instruction.split(None, 1)
        if name == ".reg":
            yield f"{_declaration(rest[0])};"
            continue
        if name not in _INSTRUCTIONS:
            raise ValueError(f"PTX that the emulation doesn't know: {instruction}")
        flat = rest[0].translate({ord(brace): None for brace in "{}"})  # vectors of registers
        values = [_value(value.strip(), operands) for value in flat.split(",")]
        yield _INSTRUCTIONS[name].format(*values)


def _declaration(text: str) -> str:
    """`.f32 v<3>` is for v0, v1 and v2."""
    kind, variable = text.split()
    name, _, count = variable.removesuffix(">").partition("<")
    names = [f"{name}{i}" for i in range(int(count))] if count else [name]
    return "; ".join(f"{_TYPES[kind.removeprefix('.')]} {each}" for each in names)


def _value(text: str, operands: list[str]) -> str:
    """A register, an operand of the statement, an address or a number."""
    text = text.removeprefix("[").removesuffix("]")
    text = re.sub(r"%(\d+)", lambda operand: operands[int(operand[1])], text)
    return _IMMEDIATE.sub(lambda bits: _float(bits[1]), text)


def _float(bits: str) -> str:
    (value,) = struct.unpack(">f", bytes.fromhex(bits))
    return f"{value.hex()}f"
