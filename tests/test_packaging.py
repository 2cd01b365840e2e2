"""One distribution out of the top-level folders: complete, layered, installable."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = (  # needs the extra `train`
    "topiarist.compiler.train_prune",
    "topiarist.pruning.dppnet",
    "topiarist.pruning.gsl",
    "topiarist.pruning.training",
)
COMMAND = "topiarist.compiler.cli_train"  # imports training when it runs
LAYERS = ("targets", "schedules", "tuning_logs", "pruning", "compiler")  # imports point left
EXAMPLE = "examples/deploy_cpp"
FOLDERS = {
    "topiarist": "topiarist",
    EXAMPLE: "topiarist.deploy_cpp",
    **{name: f"topiarist.{name}" for name in LAYERS},
}


MEASURED = "x86-sse4/packaged.jsonl"  # a tuning log put into the copy that a wheel is built from


def _modules():
    """Every Python file of the distribution with its dotted name."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            dotted = ".".join((package, *parts))
            yield path, dotted.removesuffix(".__init__")


def _imports(path):
    """The modules that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_pyproject_lists_every_subpackage():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = settings["tool"]["setuptools"]["packages"]
    found = {name for path, name in _modules() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(found)


def test_every_folder_with_modules_is_a_package():
    assert not [p for p, _ in _modules() if not (p.parent / "__init__.py").exists()]


@pytest.mark.parametrize(("path", "name"), [pytest.param(*m, id=m[1]) for m in _modules()])
def test_imports_point_down(path, name):
    own = name.split(".")[1] if name.count(".") else ""
    allowed = {"errors", *LAYERS[: LAYERS.index(own) + 1]} if own in LAYERS else {"errors"}
    for imported in _imports(path):
        parts = imported.split(".")
        assert parts[0] not in LAYERS, f"{name} imports the bare folder {imported}"
        if parts[0] == "topiarist" and len(parts) > 1:
            assert parts[1] in allowed, f"{name} imports {imported}"


@pytest.mark.parametrize(("path", "name"), [pytest.param(*m, id=m[1]) for m in _modules()])
def test_only_training_needs_torch(path, name):
    if not name.startswith((*TRAINING, COMMAND)):
        for imported in _imports(path):
            assert imported.split(".")[0] != "torch" and not imported.startswith(TRAINING)


def test_the_command_line_opens_without_torch():
    code = "import sys; sys.modules['torch'] = None; import topiarist.compiler.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def _run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, without downloads."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip('needs setuptools>=77: pip install -e ".[dev]"')
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (source / "tuning_logs" / MEASURED).parent.mkdir(exist_ok=True)
    (source / "tuning_logs" / MEASURED).touch()
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_has_all_modules_and_nothing_bare(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"topiarist"}
    folders = [package.replace(".", "/") for package in FOLDERS.values()]
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in zip(FOLDERS, folders, strict=True)
        for path in (ROOT / folder).rglob("*.py")
    }
    data = {"topiarist/py.typed", f"topiarist/tuning_logs/{MEASURED}"}
    templates = ("page.html", "charts.html", "style.css", "sort.js")
    data |= {f"topiarist/compiler/report/{name}" for name in templates}
    example = ("run_bundle.cc", "CMakeLists.txt", "README.md")
    data |= {f"topiarist/deploy_cpp/{name}" for name in example}
    boards = (ROOT / "targets" / "boards").glob("*.toml")
    data |= {f"topiarist/targets/boards/{path.name}" for path in boards}
    assert expected | data <= set(names)


def test_wheel_installs_and_every_module_imports(wheel, tmp_path):
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    _run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "-q", "--no-deps", "--no-index", wheel),
        cwd=tmp_path,
    )
    torch = importlib.util.find_spec("torch")
    modules = [name for _, name in _modules() if torch or not name.startswith(TRAINING)]
    code = f"import importlib\nfor m in {modules}: print(importlib.import_module(m).__file__)"
    # On PYTHONPATH the dependencies are found, but .pth files, so the editable install, are not.
    dependencies = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    printed = _run(python, "-c", code, cwd=tmp_path, PYTHONPATH=dependencies).splitlines()
    assert len(printed) == len(modules)
    assert all(line.startswith(str(tmp_path)) for line in printed)


WORKER = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from topiarist.pruning.patterns import find_pattern

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print(pool.submit(find_pattern, np.ones((4, 4, 3, 3))).result().kind)
"""


def test_spawned_worker_imports_from_another_folder(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    assert _run(sys.executable, tmp_path / "script.py", cwd=tmp_path) == "dense\n"
