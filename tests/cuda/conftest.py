"""A GPU that is none: a process of its own in which TVM finds the emulated driver."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.cuda import emulation


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the driver and its kernels are."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="session")
def gpu(gpu_folder: Path) -> Iterator[ProcessPoolExecutor]:
    """Submit functions of test modules; a crash of a kernel breaks it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, emulation.load, (gpu_folder,)) as process:
        yield process
