"""Builds of a network and of what it is pruned to, timed in turns with its dense build."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from topiarist.compiler import engines
from topiarist.compiler.bench import Ratio, ratio_interval, time_in_turns
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.choose import Advice
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.output_file import write_file
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.targets.spec import TargetSpec

BENCH_S = 2.0

Progress = Callable[[str, int, int], None]


class TimedBuilds:
    """Compiles into `folder`, machine code kept from one build to the next.

    `dense_us` is what the dense build of `model` takes.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        target: TargetSpec,
        *,
        threads: int,
        batch: int | None,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.target = target
        self.threads = threads
        self.batch = batch
        self.progress = progress
        self._parts = Parts(target, threads)
        self._dense_bundle = self._compile(model, "dense.topi", dense=True)
        self.progress("time", 0, 1)
        (samples,) = _in_turns([self._dense_bundle], threads)
        self.dense_us = float(np.median(samples)) * 1e6

    @property
    def dense_manifest(self) -> Manifest:
        """What the dense build says of itself."""
        return read_manifest(self._dense_bundle)

    @property
    def dense_share_of_others(self) -> float:
        """The share of the dense build's time that layers without weights take."""
        manifest = self.dense_manifest
        layers_us = sum(layer.run_us or 0.0 for layer in manifest.layers)
        others_us = sum(other.run_us for other in manifest.others)
        return others_us / (layers_us + others_us)

    def timed(self, model: onnx.ModelProto, name: str, advice: Advice) -> tuple[Manifest, Ratio]:
        """The network compiled from few candidates, and the dense build's time over its time."""
        bundle = self.build(model, name, advice)
        self.progress("time", 0, 1)
        dense, ours = _in_turns([self._dense_bundle, bundle], self.threads)
        return read_manifest(bundle), ratio_interval(dense, ours)

    def build(self, model: onnx.ModelProto, name: str, advice: Advice) -> Path:
        """The network compiled from few candidates: `name`.onnx and `name`.topi in the folder."""
        path = self.folder / f"{name}.onnx"
        write_file(path, model.SerializeToString())
        return self._compile(path, f"{name}.topi", advice=advice)

    def _compile(
        self, model: Path, name: str, *, dense: bool = False, advice: Advice | None = None
    ) -> Path:
        output = self.folder / name
        compile_model(
            model,
            target=self.target,
            output=output,
            threads=self.threads,
            batch=self.batch,
            dense=dense,
            log=self.folder / "timings.jsonl",
            parts=self._parts,
            advice=advice,
            progress=self.progress,
        )
        return output


def _in_turns(bundles: Sequence[Path], threads: int) -> list[list[float]]:
    """Seconds of single runs of each bundle, in turns."""
    feeds = random_inputs(read_manifest(bundles[0]).inputs)
    contestants = [
        replace(engines.open_bundle(bundle, feeds, threads), name=str(i))
        for i, bundle in enumerate(bundles)
    ]
    samples = time_in_turns(
        contestants, seconds=BENCH_S, rounds=None, clock=time.perf_counter, sleep=time.sleep
    )
    return [samples[one.name] for one in contestants]
