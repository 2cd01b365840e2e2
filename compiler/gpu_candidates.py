"""A network's candidates on a GPU, each tried in a process of its own.

A kernel that fails on a GPU takes the GPU from its process; the others are timed in a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from topiarist.compiler.graph import Conv
from topiarist.compiler.recorded import Recorded
from topiarist.compiler.worker import Layer, Measurer, Outcome, Variant, Worker, record_of
from topiarist.errors import GpuError
from topiarist.schedules.kernel import ConvKernel, ConvSite, KernelConfig


class GpuCandidates:
    """Times candidates of convolutions, and records what came of them, failures too."""

    def __init__(self, measurer: Measurer, recorded: Recorded | None) -> None:
        self.measurer = measurer
        self.recorded = recorded

    def __call__(
        self, kernel: ConvKernel[Any], config: KernelConfig, site: ConvSite, node: Conv
    ) -> tuple[float, ...]:
        """Seconds of each repeat. Raises GpuError for one that fails, or has by the logs."""
        failure = self._known_failure(kernel, config, site)
        if failure is not None:
            raise GpuError(failure)
        layer = Layer(site, node.weight, node.bias)
        (outcome,) = self.measurer.measure(layer, [Variant(kernel, config)]).outcomes
        self._record(kernel, config, site, outcome)
        if outcome.status != "ok":
            raise GpuError(f"{outcome.status}: {outcome.message}")
        return outcome.seconds

    def _known_failure(
        self, kernel: ConvKernel[Any], config: KernelConfig, site: ConvSite
    ) -> str | None:
        if self.recorded is None:
            return None
        match = self.recorded.logs.find(self.recorded.device.what_conv(site, kernel, config))
        if match is None or match.level != "exact" or match.record.status == "ok":
            return None
        return f"{match.record.status}, by the log: {match.record.message}"

    def _record(
        self, kernel: ConvKernel[Any], config: KernelConfig, site: ConvSite, outcome: Outcome
    ) -> None:
        if self.recorded is not None and self.recorded.adds:
            what = self.recorded.device.what_conv(site, kernel, config)
            self.recorded.logs.append([record_of(what, outcome, drift=None)])


@contextmanager
def candidates_apart(wanted: bool, recorded: Recorded | None) -> Iterator[GpuCandidates | None]:
    """What times a network's candidates; None where none are timed on a GPU."""
    if not wanted:
        yield None
        return
    with Worker(threads=1) as worker:
        yield GpuCandidates(worker, recorded)
