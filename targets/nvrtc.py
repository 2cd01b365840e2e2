"""CUDA source -> machine code, by NVIDIA's compiler library from pip: no toolkit, no driver.

The library needs no headers beyond the two of the C++ library that TVM's generated source asks
for, and these are given to it here.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

from topiarist.errors import BuildError, TargetError

PACKAGE = "nvidia-cuda-nvrtc"
_LIBRARY = "libnvrtc.so.13"
_BUILTINS = "libnvrtc-builtins.so"
# Contracting products and sums into multiply-adds is on by default; "fast math" stays off, for it
# would also flush denormals and approximate divisions.
_OPTIONS = ("--std=c++17", "--device-int128", "--disable-warnings", "--ptxas-options=-v")
_SIGNED = {"int8": "signed char", "int16": "short", "int32": "int", "int64": "long long"}
_CSTDINT = "".join(
    f"typedef {c} {name}_t; typedef unsigned {c.removeprefix('signed ')} u{name}_t;\n"
    for name, c in _SIGNED.items()
)
_TYPE_TRAITS = """
template<class A, class B> struct is_same { static constexpr bool value = false; };
template<class A> struct is_same<A, A> { static constexpr bool value = true; };
template<class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template<class A> struct is_integral;
template<class A> struct is_signed;
template<class A> struct is_unsigned;
template<class A> struct is_floating_point;
template<bool B, class A = void> struct enable_if {};
template<class A> struct enable_if<true, A> { typedef A type; };
template<bool B, class X, class Y> struct conditional { typedef X type; };
template<class X, class Y> struct conditional<false, X, Y> { typedef Y type; };
"""
_HEADERS = {
    f"cuda/std/{name}": f"#pragma once\nnamespace cuda {{ namespace std {{\n{text}}} }}\n"
    for name, text in (("cstdint", _CSTDINT), ("type_traits", _TYPE_TRAITS))
}
_PREAMBLE = "#define INFINITY __int_as_float(0x7f800000)\n"


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what the assembler said of each kernel's registers and memory."""

    code: bytes
    log: str


def require() -> None:
    """Raise TargetError, with what to install, where nothing can be compiled for a GPU."""
    _library()


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here, None where it can."""
    try:
        require()
    except TargetError as error:
        return str(error)
    return None


def compile_source(source: str, arch: str, *, ptx: bool = False) -> Compiled:
    """CUDA source as a cubin for an architecture ("sm_90"), or as PTX.

    Raises TargetError without the compiler, BuildError with its message for what it refuses.
    """
    library = _library()
    names = [name.encode() for name in _HEADERS]
    texts = [text.encode() for text in _HEADERS.values()]
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            (_PREAMBLE + source).encode(),
            b"kernels.cu",
            len(names),
            (ctypes.c_char_p * len(texts))(*texts),
            (ctypes.c_char_p * len(names))(*names),
        )
    )
    try:
        wanted = arch.replace("sm_", "compute_") if ptx else arch
        options = [option.encode() for option in (f"--gpu-architecture={wanted}", *_OPTIONS)]
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        log = _read(library, program, "ProgramLog").decode(errors="replace").rstrip("\0\n")
        if status:
            raise BuildError(f"NVIDIA's compiler refused a kernel for {arch}: {log[:2000]}")
        return Compiled(_read(library, program, "PTX" if ptx else "CUBIN"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _library() -> Any:
    try:
        files = {file.name: file for file in importlib.metadata.files(PACKAGE) or []}
        # It opens its own companion by name only, and finds it if that is loaded already.
        for name in files:
            if name.startswith(_BUILTINS):
                ctypes.CDLL(str(files[name].locate()), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(files[_LIBRARY].locate()))
    except (importlib.metadata.PackageNotFoundError, KeyError) as error:
        raise TargetError(
            "code for NVIDIA GPUs needs NVIDIA's compiler library, which isn't installed: "
            "`pip install 'topiarist[cuda]'`"
        ) from error
    except OSError as error:
        raise TargetError(
            f"NVIDIA's compiler library can't be loaded ({error}): "
            "`pip install --force-reinstall 'topiarist[cuda]'`"
        ) from error


def _read(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise BuildError(f"NVIDIA's compiler library failed with status {status}")
