"""What the tuning logs know of a network's layers, and under what they are recorded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.layouts import LayoutPlan
from topiarist.compiler.program import Call
from topiarist.compiler.runtime import versions
from topiarist.schedules.cpu.linear import LinearShape
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.kernels import CONV_KERNELS, kernels_for
from topiarist.schedules.layout import View
from topiarist.targets import detect_cuda, gpu_state, registry
from topiarist.targets.detect import detect, runs_here
from topiarist.targets.gpu_state import GpuState
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.index import Level, Site
from topiarist.tuning_logs.record import (
    Measured,
    MeasureInput,
    TargetKey,
    TuningRecord,
)
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import Usable

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
        on_gpu = target.gpu is not None
        model = detect_cuda.device_name() if on_gpu else detect().device_model
        return Device(
            target, TargetKey.of(replace(target, device_model=model), threads), versions(), "near"
        )

    @staticmethod
    def of(target: TargetSpec, threads: int) -> Device:
        """This machine if it runs the target's code, and else the target as it is named."""
        return (Device.here if runs_here(target) is None else Device.named)(target, threads)

    @staticmethod
    def named(target: TargetSpec, threads: int) -> Device:
        """The target as it is named: a profile stands for any device with its instructions."""
        loosest: Level = "near" if target.name == registry.HOST else "other device"
        key = TargetKey.of(target, threads)
        if target.clusters:  # records of such cores come before those of others
            key = replace(key, cores=target.mcpu)
        return Device(target, key, versions(), loosest)

    def gpu(self) -> GpuState | None:
        """What this machine's GPU runs with, None for other targets."""
        return gpu_state.read() if self.target.gpu is not None else None

    def what_conv(
        self, site: ConvSite, kernel: ConvKernel[Any], config: KernelConfig
    ) -> MeasureInput:
        """A convolution's candidate as records name it."""
        return MeasureInput.of_conv(
            site.workload, kernel, config, site.views, self.key, self.versions
        )

    def what_linear(self, node: Linear, shape: LinearShape, kernel: str) -> MeasureInput:
        """A fully connected layer's candidate as records name it."""
        return self._unit(_linear_workload(node, shape), kernel, {})

    def what_call(self, call: Call) -> MeasureInput:
        """A call that is neither convolution nor fully connected layer: a pool, a move, a sum."""
        kind = re.sub(r"_\d+$", "", call.function)
        read_bytes = sum(ref.bytes for ref in call.reads)
        workload = {"kind": kind, "read_bytes": read_bytes, "written_bytes": call.output.bytes}
        return self._unit(workload, kind, {})

    def what_network(self, graph: Graph, layouts: LayoutPlan) -> MeasureInput:
        """A whole network in its layouts as records name it."""
        views = [
            str(place.view)
            for node in graph.nodes
            for place in (*layouts.reads[node.name], layouts.places[node.output])
        ]
        return self._unit(_network_workload(graph), NETWORK, {"layouts": _digest(views)})

    def _unit(
        self, workload: Mapping[str, Any], kernel: str, config: Mapping[str, Any]
    ) -> MeasureInput:
        return MeasureInput(
            *(workload, kernel, UNIT_VERSION, config, PLAIN, PLAIN, "none", self.key, self.versions)
        )


def is_current(what: MeasureInput) -> bool:
    """Whether today's kernels and TVM would still take the same time."""
    tvm = "apache-tvm"
    same_code = is_current_kernel(what.kernel, what.kernel_version)
    return same_code and what.versions[tvm] == versions()[tvm]


def is_current_kernel(name: str, version: int) -> bool:
    """Whether this is the kernel's version of today."""
    known = {kernel.name: kernel.version for kernel in CONV_KERNELS}
    return known.get(name, UNIT_VERSION) == version


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
            self.logs.append([TuningRecord(what, seconds, gpu=self.device.gpu())])

    def add_networks(self, found: Iterable[tuple[MeasureInput, tuple[float, ...]]]) -> None:
        """Append what was measured in a network, if this was asked for."""
        if self.adds:
            gpu = self.device.gpu()
            self.logs.append(TuningRecord(what, s, "in network", gpu=gpu) for what, s in found)

    def convs(self, site: ConvSite, measured: Measured) -> list[Known]:
        """The candidates with a time for a layer in its place, fastest first."""
        place = Site.of_conv(site.workload, site.views, self.device.key, self.device.versions)
        candidates = _Candidates(site)
        found = self._best(place, measured, lambda record: candidates.of(record) is not None)
        known = ((candidates.of(record), record) for record in found)
        return [Known(*candidate, record) for candidate, record in known if candidate is not None]

    def linears(self, node: Linear, shape: LinearShape, measured: Measured) -> list[TuningRecord]:
        """The kernels' times for a fully connected layer, fastest first."""
        tvm = self.device.versions["apache-tvm"]
        workload = _linear_workload(node, shape)
        place = Site(workload, (PLAIN, PLAIN, "none"), self.device.key, tvm)
        return self._best(place, measured, lambda r: r.input.kernel_version == UNIT_VERSION)

    def network_us(self, graph: Graph, layouts: LayoutPlan) -> float | None:
        """What the network took in these layouts with the best kernels, None if nobody looked."""
        match = self.logs.find(
            self.device.what_network(graph, layouts),
            "in network",
            loosest=self.device.loosest,
            usable=self._usable,
        )
        return None if match is None else match.record.run_us

    def _best(self, site: Site, measured: Measured, usable: Usable) -> list[TuningRecord]:
        matches = self.logs.best(
            site,
            measured,
            loosest=self.device.loosest,
            usable=lambda record: self._usable(record) and usable(record),
        )
        return [match.record for match in matches]

    def _usable(self, record: TuningRecord) -> bool:
        """Another TVM generates other code."""
        tvm = "apache-tvm"
        return record.status == "ok" and record.input.versions[tvm] == self.device.versions[tvm]


class _Candidates:
    """What this version of topiarist would try for a layer in its place."""

    def __init__(self, site: ConvSite) -> None:
        self.site = site
        self._configs: dict[str, list[KernelConfig]] = {}

    def of(self, record: TuningRecord) -> tuple[ConvKernel[Any], KernelConfig] | None:
        """The kernel and the knobs of a record, None if they would not be tried."""
        what = record.input
        for kernel in kernels_for(self.site.target):
            if (kernel.name, kernel.version) == (what.kernel, what.kernel_version):
                for config in self._fitting(kernel):
                    if asdict(config) == what.config:
                        return kernel, config
        return None

    def _fitting(self, kernel: ConvKernel[Any]) -> list[KernelConfig]:
        if kernel.name not in self._configs:
            refused = kernel.refuses(self.site.workload, self.site.target) is not None
            knobs = [] if refused else kernel.knobs(self.site)
            self._configs[kernel.name] = [c for c in knobs if kernel.fits(self.site, c)]
        return self._configs[kernel.name]


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
