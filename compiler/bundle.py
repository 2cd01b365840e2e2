"""A compiled network on disk: a folder with `lib.so`, `weights.bin` and `manifest.json`.

Writing is all or nothing. Opening trusts nothing it can check: schema, versions, CPU, the size
and hash of each file. (The hashes find damage; they are no protection against an attacker, for
the library is native code. Open only bundles of whom you trust.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler import manifest as manifests
from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.gpu_code import CodePacker
from topiarist.compiler.manifest import FileEntry, Manifest, ParamEntry, SourceModel
from topiarist.compiler.runtime import ALIGNMENT, versions
from topiarist.errors import BuildError, BundleError, ModelError, OutputError
from topiarist.targets.detect import runs_here
from topiarist.targets.linker import AUTOMATIC, Linker, LinkOptions, find_linker

LIBRARY = "lib.so"
WEIGHTS = "weights.bin"
MANIFEST = "manifest.json"
_FILES = {LIBRARY, WEIGHTS, MANIFEST}
_AGAIN = "compile the model again"


def check_writable(path: Path | str) -> Path:
    """The bundle's absolute path, or OutputError when no bundle could be written there.

    For before a long compilation: it creates and removes a folder beside the bundle.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; name another output")
    if path.is_dir() and not _replaceable(path):
        raise OutputError(f"{path} is a folder that is no bundle; name another output")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} of the output doesn't exist; create it first")
    probe = _beside(path, "probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}") from error
    return path


def write_bundle(
    compiled: CompiledModel,
    path: Path | str,
    *,
    source: Path | str | None = None,
    reproducible: bool = False,
    link: LinkOptions = AUTOMATIC,
) -> Path:
    """Write the compiled network as a bundle; an existing bundle is replaced.

    `source` is the model file that was compiled. A `reproducible` bundle names it as it is given
    here, and not where it lies on this machine. `link` is about linking for another machine.
    Raises OutputError when the folder can't be written and BuildError when linking fails; then
    nothing is left and an old bundle is intact.
    """
    path = check_writable(path)
    origin = None if source is None else describe_source(Path(source))
    if origin is not None and reproducible:
        origin = replace(origin, path=str(source))
    aside = _beside(path, "new")
    try:
        aside.mkdir()
        _fill(aside, compiled, origin, find_linker(compiled.target, link))
        _put_in_place(aside, path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def describe_source(model: Path) -> SourceModel:
    """Name, hash and place of a model file. Raises ModelError if it can't be read."""
    try:
        return SourceModel(model.name, hash_file(model), str(model.resolve()))
    except OSError as error:
        raise ModelError(f"can't read the model {model}: {error.strerror}") from error


def hash_file(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of a bundle. Raises BundleError if there is none that can be understood."""
    folder = Path(path)
    data = _read_json(folder)
    if data.get("format") != manifests.FORMAT:
        raise BundleError(f"{folder} is no topiarist bundle: its {MANIFEST} says something else")
    if data.get("schema") != manifests.SCHEMA:
        raise BundleError(
            f"{folder} has the bundle schema {data.get('schema')!r} and this version of topiarist "
            f"reads {manifests.SCHEMA}; {_AGAIN} with this version"
        )
    if data.get("digest") != manifests.digest(data):
        raise BundleError(f"{folder}/{MANIFEST} was altered after it was compiled; {_AGAIN}")
    try:
        return manifests.parse(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{folder}/{MANIFEST} is damaged ({error!r}); {_AGAIN}") from error


def check_bundle(path: Path | str) -> Manifest:
    """The manifest of a bundle that is whole and of this version, whatever machine it is for.

    Raises BundleError.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_versions(folder, manifest)
    for name in (LIBRARY, WEIGHTS):
        _check_file(folder / name, manifest)
    return manifest


class OpenBundle:
    """A bundle that runs on this machine, its library checked, its weights mapped.

    The weights are hashed meanwhile, in a thread: they are large, and a session has other things
    to do until they matter. `checked` waits for it. Raises BundleError.
    """

    def __init__(self, path: Path | str) -> None:
        folder = Path(path)
        self.manifest = read_manifest(folder)
        if reason := runs_here(self.manifest.target):
            raise BundleError(f"{folder} can't run here: {reason}; {_elsewhere(self.manifest)}")
        _check_versions(folder, self.manifest)
        self._path = folder / WEIGHTS
        _check_file(folder / LIBRARY, self.manifest)
        with _readable(self._path), self._path.open("rb") as file:
            _check_size(self._path, self.manifest)
            # A private mapping: DLPack refuses read-only arrays, and nobody writes.
            self.weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._digest = ""
        self._hashing = threading.Thread(target=self._hash)
        self._hashing.start()

    def _hash(self) -> None:
        # In one call, which lets go of the interpreter: in pieces it would wait for it each time.
        self._digest = hashlib.sha256(self.weights).hexdigest()

    def checked(self) -> Manifest:
        """The manifest, once the weights are known to be those that were written."""
        self._hashing.join()
        if self._digest != self.manifest.files[WEIGHTS].sha256:
            raise _altered(self._path)
        return self.manifest


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "doesn't exist"
        raise BundleError(f"{folder} {problem}; a bundle is written by `topiarist compile`")
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(
            f"{folder} is no bundle: {MANIFEST} can't be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder}/{MANIFEST} is damaged: it is no JSON; {_AGAIN}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{folder}/{MANIFEST} is damaged: it is no JSON object; {_AGAIN}")
    return data


def _elsewhere(manifest: Manifest) -> str:
    """What to do with a bundle that is for another machine."""
    if manifest.target.toolchain is None:
        return "compile it for --target host"
    return (
        "copy it to the device and run it there, try it without one (`topiarist verify "
        "--emulate`), or compile it for --target host"
    )


def _check_versions(folder: Path, manifest: Manifest) -> None:
    for package in ("apache-tvm", "apache-tvm-ffi"):
        built, here = manifest.versions.get(package, "none"), versions()[package]
        if _release(built) != _release(here):
            raise BundleError(
                f"{folder} was compiled with {package} {built} and {here} is installed; "
                f"{_AGAIN}, or install {package}=={built}"
            )


def _release(version: str) -> tuple[str, ...]:
    """`0.27.0.post1` -> (0, 27, 0): the parts that binary compatibility depends on."""
    return tuple(version.split("+")[0].split(".")[:3])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from error


def _check_file(path: Path, manifest: Manifest) -> None:
    with _readable(path):
        _check_size(path, manifest)
        if hash_file(path) != manifest.files[path.name].sha256:
            raise _altered(path)


def _check_size(path: Path, manifest: Manifest) -> None:
    expected, size = manifest.files.get(path.name), path.stat().st_size
    if expected is None:
        raise _altered(path)
    if size != expected.size:
        raise BundleError(f"{path} has {size} bytes and {expected.size} were written; {_AGAIN}")


def _altered(path: Path) -> BundleError:
    return BundleError(f"{path} was altered after it was compiled; {_AGAIN}")


def _fill(
    folder: Path, compiled: CompiledModel, source: SourceModel | None, linker: Linker | None
) -> None:
    gpu = compiled.target.gpu
    options: dict[str, Any] = {} if gpu is None else {"fpack_imports": CodePacker(gpu.arch)}
    if linker is None:
        _export_here(compiled, folder / LIBRARY, options)
    else:
        compiled.executable.export_library(str(folder / LIBRARY), fcompile=linker, **options)
    params = _write_weights(compiled.params, folder / WEIGHTS)
    manifest = Manifest(
        versions=versions(),
        target=compiled.target,
        threads=compiled.threads,
        inputs=compiled.inputs,
        outputs=compiled.outputs,
        params=params,
        layers=compiled.layers,
        files={name: _describe(folder / name) for name in (LIBRARY, WEIGHTS)},
        source=source,
        created=compiled.created,
        network_us=compiled.network_us,
        others=compiled.others,
    )
    (folder / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")


def _export_here(compiled: CompiledModel, library: Path, options: dict[str, Any]) -> None:
    from tvm.support.cc import get_cc

    compiler = get_cc()
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError(
            f"no C compiler to link the network with ({compiler or 'gcc'} isn't there); "
            "install gcc, or set CC to a compiler"
        )
    try:
        compiled.executable.export_library(str(library), **options)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(error).split())[:500]
        raise BuildError(f"{compiler} failed to link the network: {reason}") from error


def _write_weights(arrays: Sequence[NDArray[np.generic]], path: Path) -> tuple[ParamEntry, ...]:
    """Write the arrays one after the other, each at an aligned offset."""
    entries = []
    with path.open("wb") as file:
        for array in arrays:
            file.write(bytes(-file.tell() % ALIGNMENT))
            entries.append(ParamEntry(file.tell(), array.shape, array.dtype.name))
            file.write(np.ascontiguousarray(array).data)
        file.write(bytes(ALIGNMENT))  # never empty, so that it can be mapped
    return tuple(entries)


def _describe(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, hash_file(path))


def _put_in_place(aside: Path, path: Path) -> None:
    """Rename the finished folder to its name; an old bundle goes only when that has worked."""
    with _moved_away(path):
        aside.rename(path)


@contextlib.contextmanager
def _moved_away(path: Path) -> Iterator[None]:
    old = _beside(path, "old")
    existed = path.exists()
    if existed:
        path.rename(old)
    try:
        yield
    except BaseException:
        if existed:
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    """Whether the folder is empty or a bundle, with nothing else in it."""
    try:
        found = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"can't write {folder}: {error.strerror}") from error
    return not found or (LIBRARY in found and found <= _FILES)


def _beside(path: Path, purpose: str) -> Path:
    """A new hidden name in the folder of the bundle, so that renaming stays on one disk."""
    return path.parent / f".{path.name}.{purpose}-{uuid4().hex[:8]}"
