"""A GPU that is none: a process of its own in which TVM finds the emulated driver."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.cuda import emulation


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """Submit functions of test modules; a crash of a kernel breaks it."""
    folder = tmp_path_factory.mktemp("gpu")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, emulation.load, (folder,)) as process:
        yield process
