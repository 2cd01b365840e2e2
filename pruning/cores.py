"""Share out numerical work over the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import scipy.linalg  # noqa: F401  (loads the BLAS that the controller is to find)
from threadpoolctl import ThreadpoolController

from topiarist.targets.linux import available_cores

_libraries = ThreadpoolController()  # finding them takes longer than many a product

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_blas_thread() -> AbstractContextManager[object]:
    """BLAS on one thread as long as this lasts.

    By itself it splits every small product, and its threads wait for each other in a loop: on a
    machine with other work that takes a hundred times as long.
    """
    limited: AbstractContextManager[object] = _libraries.limit(limits=1, user_api="blas")
    return limited


def on_all_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in order; each core works at an item of its own, with BLAS on one thread."""
    with one_blas_thread(), ThreadPoolExecutor(available_cores()) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
