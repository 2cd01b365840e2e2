"""A latency model in place of the clock: for choosing kernels where nothing can be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from topiarist.compiler.model_files import find_model
from topiarist.compiler.prices import Learned, Pricer
from topiarist.compiler.recorded import Device
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import MeasureInput


@dataclass(frozen=True)
class Predictor:
    """What a latency model says of candidates on a device; `name` is the model's, for people."""

    device: Device
    pricer: Pricer
    name: str

    def run_us(self, whats: Sequence[MeasureInput]) -> list[float]:
        """Expected microseconds, inside a network."""
        return [float(us) for us in self.pricer.prices_us(whats)[0]] if whats else []


def find_predictor(target: TargetSpec, threads: int) -> Predictor | None:
    """The latency model of the target, the user's or the package's; None where there is none."""
    device = Device.named(target, threads)
    found = find_model(device.key, target)
    return None if found is None else Predictor(device, Learned(found.model), found.name)
