"""What the tuning logs know of a network's layers, and under what they are recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.layouts import LayoutPlan
from topiarist.compiler.runtime import versions
from topiarist.schedules.cpu.linear import LinearShape
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.layout import View
from topiarist.targets import registry
from topiarist.targets.detect import detect
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.index import Level, Site
from topiarist.tuning_logs.record import (
    Measured,
    MeasureInput,
    TargetKey,
    TuningRecord,
    view_text,
)
from topiarist.tuning_logs.sources import TuningLogs

PLAIN = "plain"
NETWORK = "network"
UNIT_VERSION = 1  # of the kernels outside `CONV_KERNELS`: raised when old times no longer hold


@dataclass(frozen=True)
class Device:
    """Whose times count: the key of records, and how far from it a record may be."""

    target: TargetSpec
    key: TargetKey
    versions: Mapping[str, str]
    loosest: Level

    @staticmethod
    def here(target: TargetSpec, threads: int) -> Device:
        """This machine, whatever profile the code is built for."""
        model = detect().device_model
        return Device(
            target, TargetKey.of(replace(target, device_model=model), threads), versions(), "near"
        )

    @staticmethod
    def named(target: TargetSpec, threads: int) -> Device:
        """The target as it is named: a profile stands for any device with its instructions."""
        loosest: Level = "near" if target.name == registry.HOST else "other device"
        return Device(target, TargetKey.of(target, threads), versions(), loosest)


@dataclass(frozen=True)
class Known:
    """A candidate that a log has a time of."""

    kernel: ConvKernel[Any]
    config: KernelConfig
    record: TuningRecord


def strip(views: ConvViews) -> ConvViews:
    """The views as far as speed depends on them: which channels of a buffer does not matter."""

    def first(view: View | None) -> View | None:
        return None if view is None else replace(view, first=0)

    x, y = first(views.x), first(views.y)
    assert x is not None and y is not None
    return ConvViews(x, y, first(views.residual), views.in_place)


class Recorded:
    """The logs as seen by one device."""

    def __init__(self, logs: TuningLogs, device: Device, *, adds: bool = False) -> None:
        self.logs = logs
        self.device = device
        self.adds = adds

    def add(self, what: MeasureInput, seconds: tuple[float, ...]) -> None:
        """Append what was measured alone, if this was asked for."""
        if self.adds:
            self.logs.append([TuningRecord(what, seconds)])

    def add_networks(self, found: Iterable[tuple[MeasureInput, tuple[float, ...]]]) -> None:
        """Append what was measured in a network, if this was asked for."""
        if self.adds:
            self.logs.append(TuningRecord(what, s, "in network") for what, s in found)

    def what_conv(
        self, site: ConvSite, kernel: ConvKernel[Any], config: KernelConfig
    ) -> MeasureInput:
        """A convolution's candidate as records name it."""
        return MeasureInput.of_conv(
            site.workload, kernel, config, site.views, self.device.key, self.device.versions
        )

    def convs(self, site: ConvSite, measured: Measured) -> list[Known]:
        """The candidates with a time for a layer in its place, fastest first."""
        views = site.views
        residual = "in place" if views.in_place else "none"
        residual = residual if views.residual is None else view_text(views.residual)
        layouts = view_text(views.x), view_text(views.y), residual
        found = []
        for record in self._best(site.workload.to_json(), layouts, measured):
            known = _candidate(site, record)
            if known is not None:
                found.append(known)
        return found

    def what_linear(self, node: Linear, shape: LinearShape, kernel: str) -> MeasureInput:
        """A fully connected layer's candidate as records name it."""
        return self._unit(_linear_workload(node, shape), kernel, {})

    def linears(self, node: Linear, shape: LinearShape, measured: Measured) -> list[TuningRecord]:
        """The kernels' times for a fully connected layer, fastest first."""
        found = self._best(_linear_workload(node, shape), (PLAIN, PLAIN, "none"), measured)
        return [record for record in found if record.input.kernel_version == UNIT_VERSION]

    def what_network(self, graph: Graph, layouts: LayoutPlan) -> MeasureInput:
        """A whole network in its layouts as records name it."""
        views = [
            str(place.view)
            for node in graph.nodes
            for place in (*layouts.reads[node.name], layouts.places[node.output])
        ]
        return self._unit(_network_workload(graph), NETWORK, {"layouts": _digest(views)})

    def network_us(self, graph: Graph, layouts: LayoutPlan) -> float | None:
        """What the network took in these layouts with the best kernels, None if nobody looked."""
        match = self.logs.find(
            self.what_network(graph, layouts), "in network", loosest=self.device.loosest
        )
        if match is None or not self._usable(match.record):
            return None
        return match.record.run_us

    def _unit(
        self, workload: Mapping[str, Any], kernel: str, config: Mapping[str, Any]
    ) -> MeasureInput:
        key, package_versions = self.device.key, self.device.versions
        return MeasureInput(
            *(workload, kernel, UNIT_VERSION, config, PLAIN, PLAIN, "none", key, package_versions)
        )

    def _best(
        self, workload: Mapping[str, Any], layouts: tuple[str, str, str], measured: Measured
    ) -> Iterator[TuningRecord]:
        site = Site(workload, layouts, self.device.key, self.device.versions["apache-tvm"])
        for match in self.logs.best(site, measured, loosest=self.device.loosest):
            if self._usable(match.record):
                yield match.record

    def _usable(self, record: TuningRecord) -> bool:
        """Another TVM generates other code."""
        tvm = "apache-tvm"
        return record.status == "ok" and record.input.versions[tvm] == self.device.versions[tvm]


def _candidate(site: ConvSite, record: TuningRecord) -> Known | None:
    """The kernel and its knobs, None where this version of topiarist would not try them."""
    what = record.input
    for kernel in CONV_KERNELS:
        if (kernel.name, kernel.version) != (what.kernel, what.kernel_version):
            continue
        if kernel.refuses(site.workload, site.target) is not None:
            return None
        for config in kernel.knobs(site):
            if asdict(config) == what.config and kernel.fits(site, config):
                return Known(kernel, config, record)
    return None


def _linear_workload(node: Linear, shape: LinearShape) -> dict[str, Any]:
    density = float(np.count_nonzero(node.weight)) / max(node.weight.size, 1)
    return {"kind": "linear", **asdict(shape), "sparsity": _sparsity(density)}


def _network_workload(graph: Graph) -> dict[str, Any]:
    """Its layers' kinds and shapes as a hash, and the density of all weights together."""
    layers = [
        [type(node).__name__, *(graph.values[name].shape for name in (*node.inputs, node.output))]
        for node in graph.nodes
    ]
    weights = [node.weight for node in graph.nodes if isinstance(node, Conv | Linear)]
    size = sum(weight.size for weight in weights)
    density = sum(int(np.count_nonzero(weight)) for weight in weights) / max(size, 1)
    return {"kind": NETWORK, "layers": _digest(layers), "sparsity": _sparsity(density)}


def _sparsity(density: float) -> dict[str, Any]:
    """As convolutions have it, so that records of about the same density are found."""
    return {"density": round(density, 3), "pattern": "any", "row_quantiles": [0, 0, 0]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
