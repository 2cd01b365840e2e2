"""Share out numerical work over the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from topiarist.targets.detect import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in order. Each core works at its own item, with BLAS on one thread.

    BLAS by itself splits every small product, and its threads wait for each other in a loop: on a
    machine with other work that takes ten times as long.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(available_cores()) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
