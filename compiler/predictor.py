"""A latency model in place of the clock: for choosing kernels where nothing can be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from topiarist.compiler.model_files import default_model, holds_today
from topiarist.compiler.prices import Learned, Pricer
from topiarist.compiler.recorded import Device
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.cost_model import LatencyModel
from topiarist.tuning_logs.record import MeasureInput


@dataclass(frozen=True)
class Predictor:
    """What a latency model says of candidates on a device."""

    device: Device
    pricer: Pricer

    def run_us(self, whats: Sequence[MeasureInput]) -> list[float]:
        """Expected microseconds, inside a network."""
        return [float(us) for us in self.pricer.prices_us(whats)[0]] if whats else []


def users_predictor(target: TargetSpec, threads: int) -> Predictor | None:
    """The user's latency model of the target.

    None where there is none, or it is of another device, TVM or version of a kernel.
    """
    named = Device.named(target, threads)
    file = default_model(named.key)
    if not file.exists():
        return None
    model = LatencyModel.load(file)
    same_device = model.covers.target.device_model == named.key.device_model
    # A GPU's target stands for all of its architecture.
    if not (same_device or target.gpu is not None) or not holds_today(model.covers):
        return None
    return Predictor(replace(named, key=model.covers.target), Learned(model))
