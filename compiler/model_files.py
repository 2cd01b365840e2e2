"""Which latency model serves a target: the named one, the user's, the package's, or a formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from topiarist.compiler.prices import Analytic, Counted, Learned, Pricer
from topiarist.compiler.recorded import Device, is_current_kernel
from topiarist.compiler.roofline import with_roofline
from topiarist.compiler.runtime import versions
from topiarist.errors import CostModelError
from topiarist.targets.detect import runs_here
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.cost_model import Covers, LatencyModel
from topiarist.tuning_logs.record import TargetKey
from topiarist.tuning_logs.roofline import Roofline
from topiarist.tuning_logs.sources import SHIPPED, user_folder

MODEL_FILE = "latency.json"
SHIPPED_FILE = "latency_model.json"


def default_model(target: TargetKey, folder: Path | None = None) -> Path:
    """Where the user's model for a target's instructions and number of threads is."""
    name = f"{target.family}-{target.isa}-{target.threads}-{MODEL_FILE}"
    return (user_folder() if folder is None else folder) / name


def shipped_model(target: TargetKey) -> LatencyModel | None:
    """The model that comes with the package for these instructions; None without a current one.

    It may be of another processor: its times are a start.
    """
    path = SHIPPED / f"{target.family}-{target.isa}" / SHIPPED_FILE
    if not path.exists():
        return None
    try:
        model = LatencyModel.load(path)
    except CostModelError:  # made for other features: nobody's fault but ours
        return None
    same = replace(target, device_model=model.covers.target.device_model)
    fits = model.covers.target == same and holds_today(model.covers)
    return model if fits else None


def holds_today(covers: Covers) -> bool:
    """Whether today's kernels and TVM would still take the same time."""
    same_code = all(is_current_kernel(*kernel) for kernel in covers.kernels.items())
    return same_code and covers.tvm == versions()["apache-tvm"]


def open_model(path: Path | None, target: TargetKey) -> LatencyModel:
    """A model file; without one named the user's, or the package's. Raises CostModelError."""
    if path is None and not default_model(target).exists():
        found = shipped_model(target)
        if found is not None:
            return found.standing_for(target)
    return LatencyModel.load(default_model(target) if path is None else path)


def serving(model: LatencyModel, key: TargetKey, target: TargetSpec) -> LatencyModel:
    """The model as the key asks for it: a GPU that is only named is any of its architecture."""
    named = target.gpu is not None and runs_here(target) is not None
    alike = model.covers.target == replace(key, device_model=model.covers.target.device_model)
    return model.standing_for(key) if named and alike else model


@dataclass(frozen=True)
class Source:
    """What prices layers, and its name for people."""

    pricer: Pricer
    name: str


def open_source(
    target: TargetSpec, threads: int, path: Path | None, device: Device | None = None
) -> Source:
    """The named model; without a name the user's or the package's if it fits; else the formula.

    `device` is the one whose times count, this machine if it is left out. The formula needs the
    machine's peak and bandwidth, stated by the target or measured here; for GPUs a count of their
    work stands in for it. A GPU that is only named is served by a model of any of its architecture.
    Raises CostModelError if a named model covers another target, or none of these will do.
    """
    key = (device or Device.here(target, threads)).key
    file = default_model(key) if path is None else path
    if path is not None or file.exists():
        model = serving(LatencyModel.load(file), key, target)
        if model.covers.target == key:
            return Source(Learned(model), f"the latency model {file} ({_records(model)} records)")
        if path is not None:
            model.covers.check_target(key)
    shipped = shipped_model(key)
    if shipped is not None:
        return Source(Learned(shipped.standing_for(key)), _shipped_name(shipped, key))
    if target.gpu is not None:
        name = "counted work, which no GPU has confirmed (`topiarist model collect` measures)"
        return Source(Counted(), name)
    if runs_here(target) is None:
        target = with_roofline(target)
    if target.peak_gflops is None or target.bandwidth_gbs is None:
        raise CostModelError(
            f"{target.name}: there is neither a latency model nor a record, and this machine can't "
            "run its code. Measure on the device (`topiarist model collect`), train "
            "(`topiarist model train`), and name the model with --model"
        )
    roofline = Roofline.of_peak(target.peak_gflops, target.bandwidth_gbs)
    return Source(Analytic(roofline), "the analytic formula, for want of a latency model")


def _records(model: LatencyModel) -> object:
    return model.card.get("records", "unknown")


def _shipped_name(model: LatencyModel, key: TargetKey) -> str:
    """Says on which processor it was measured, where that is not this one."""
    name = f"the latency model that comes with topiarist ({_records(model)} records"
    measured = model.covers.target.device_model
    if measured == key.device_model:
        return f"{name})"
    this = key.device_model or "an unnamed processor"
    return (
        f"{name} of {measured}; not of {this}, so `topiarist model collect` would make it better)"
    )
