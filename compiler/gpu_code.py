"""Machine code for GPUs inside a compiled network, made without a GPU.

TVM embeds machine code where its CUDA runtime can be loaded, and the source elsewhere. Here the
library gets machine code everywhere, of the target's architecture, by NVIDIA's own compiler.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.errors import BuildError
from topiarist.targets import nvrtc
from topiarist.targets.spec import TargetSpec

_KIND, _SOURCE, _CODE = b"cuda", b"cuda", b"cubin"
_IN_LIBRARY = b"_lib"  # stands for the module that the library itself is, and has no content


def use_compiler(target: TargetSpec) -> None:
    """Let TVM compile with ours where it compiles at once: on a machine with a GPU."""
    if target.gpu is not None:
        import tvm_ffi  # `runtime` decides when it is loaded, where bundles are only run

        arch = target.gpu.arch
        tvm_ffi.register_global_func(
            "tvm_callback_cuda_compile",
            lambda source: nvrtc.compile_source(source, arch).code,
            override=True,
        )


@dataclass(frozen=True)
class CodePacker:
    """`export_library(fpack_imports=...)`: what is beside the host's code."""

    arch: str

    def __call__(self, module: Any, is_system_lib: bool, prefix: str, workspace: str) -> str:
        """Write the imports as a C file, GPUs' machine code among them; its path."""
        from tvm.runtime import _ffi_api

        text = _ffi_api.ModulePackImportsToC(module, is_system_lib, prefix)
        head, numbers = text.split("] = {", 1)
        blob = bytes(int(number, 16) for number in re.findall("0x[0-9a-f]{2}", numbers))
        blob = with_machine_code(blob, _sources(module), self.arch)
        name = head[: head.rindex("[")].split()[-1]
        path = Path(workspace) / "imports.c"
        path.write_text(
            '#ifdef __cplusplus\nextern "C"\n#else\nextern\n#endif\n'
            f"const unsigned char {name}[];\n"
            f"const unsigned char {name}[] = {{{','.join(map(str, blob))}}};\n"
        )
        return str(path)


def _sources(module: Any) -> list[bytes]:
    """The source of every CUDA module among the imports."""
    found = [module.inspect_source("").encode()] if module.kind == _KIND.decode() else []
    return [*found, *(source for other in module.imports for source in _sources(other))]


def with_machine_code(blob: bytes, sources: list[bytes], arch: str) -> bytes:
    """TVM's serialized modules, with CUDA source in them replaced by what it compiles to.

    The format: length of all, two lists of 64-bit numbers (the tree), then kind and content of
    each module, all strings behind their lengths. A CUDA module is a format, a table of functions,
    and the code.
    """
    reader = _Reader(blob, 8)
    for _ in range(2):
        count = reader.number()
        reader.at += 8 * count
    parts = [blob[8 : reader.at]]
    while reader.at < len(blob):
        kind = reader.string()
        parts.append(_string(kind))
        if kind != _IN_LIBRARY:
            content = reader.string()
            parts.append(_string(_compiled(content, sources, arch) if kind == _KIND else content))
    whole = b"".join(parts)
    return struct.pack("<Q", len(whole)) + whole


def _compiled(content: bytes, sources: list[bytes], arch: str) -> bytes:
    """A CUDA module with machine code; one that has it stays as it is."""
    if not content.startswith(_string(_SOURCE)):
        return content
    source = next((s for s in sources if content.endswith(_string(s))), None)
    if source is None:
        raise BuildError(
            "this apache-tvm keeps CUDA source in an unknown way; install the version that "
            "topiarist asks for"
        )
    code = nvrtc.compile_source(source.decode(), arch).code
    table = content[len(_string(_SOURCE)) : -len(_string(source))]
    return _string(_CODE) + table + _string(code)


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@dataclass
class _Reader:
    """Little-endian numbers and strings, from a position on."""

    data: bytes
    at: int

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return int(value)

    def string(self) -> bytes:
        size = self.number()
        self.at += size
        return self.data[self.at - size : self.at]
