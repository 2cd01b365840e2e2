"""Timing a bundle against other engines, so that the ratio can be believed.

The engines take turns in one process: in each round every engine is timed once, in an order that
rotates, and the ratio is taken within the round. What disturbs the machine for longer than a
round disturbs both sides of a ratio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topiarist.compiler import engines
from topiarist.compiler.bundle import MANIFEST, hash_file, read_manifest
from topiarist.compiler.engines import OURS, Engine
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.manifest import Manifest
from topiarist.errors import ModelError

WARM_UP = 3  # runs of each engine before anything is timed
MIN_ROUNDS = 9  # the fewest whose 95 % interval leaves the extremes out
SAMPLE_S = 0.002  # a quicker network is timed over several runs that last this long together
SETTLE_S = 0.002  # pause before a turn: another engine's threads may still spin

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Latency of one engine over all rounds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    threads: int
    version: str


@dataclass(frozen=True)
class Ratio:
    """The other engine's time over ours: median of the rounds and its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchResult:
    """`engines` by name, ours first; `ratio` by the other's name, above 1 where ours is faster.

    `gpu` is what our part on a GPU takes of that, None on a CPU.
    """

    engines: dict[str, Timing]
    ratio: dict[str, Ratio]
    rounds: int
    threads: int
    batch: int | None
    gpu: Timing | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)


def bench(
    bundle: Path | str,
    model: Path | str | None = None,
    against: Sequence[str] = ("ort",),
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    runs: int | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> BenchResult:
    """Time the bundle and the other engines on the same random inputs with the same threads.

    `runs` fixes the number of rounds, which otherwise go on for about `seconds`. The model is by
    default the one that was compiled, where it still is. Raises ValueError for unknown engines.
    """
    engines.check_names(list(against))
    manifest = read_manifest(bundle)
    threads = manifest.threads if threads is None else threads
    feeds = random_inputs(manifest.inputs)
    contestants = [engines.open_bundle(Path(bundle), feeds, threads)]
    if against:
        source = find_model(manifest, None if model is None else Path(model))
        contestants += [engines.open_engine(n, source, feeds, threads) for n in against]
    samples = time_in_turns(contestants, seconds=seconds, rounds=runs, clock=clock, sleep=sleep)
    shape = manifest.inputs[0].shape
    on_gpu = [s for _ in samples[OURS] if (s := contestants[0].gpu_seconds()) is not None]
    return BenchResult(
        engines={e.name: _timing(e, samples[e.name]) for e in contestants},
        ratio={n: ratio_interval(samples[n], samples[OURS]) for n in against},
        rounds=len(samples[OURS]),
        threads=threads,
        batch=shape[0] if shape else None,
        gpu=_timing(contestants[0], on_gpu) if on_gpu else None,
    )


def find_model(manifest: Manifest, model: Path | None) -> Path:
    """The named model, or the one the bundle was compiled from if it is still there, unchanged."""
    if model is not None:
        return model
    source = manifest.source
    if source is None:
        raise ModelError(f"{MANIFEST} names no source model; name it with --model")
    path = Path(source.path)
    if not path.is_file():
        raise ModelError(f"the model that was compiled, {path}, is gone; name it with --model")
    if hash_file(path) != source.sha256:
        raise ModelError(
            f"{path} has changed since it was compiled; compile again, or name the model with "
            "--model"
        )
    return path


def time_in_turns(
    contestants: Sequence[Engine],
    *,
    seconds: float,
    rounds: int | None,
    clock: Clock,
    sleep: Callable[[float], None],
) -> dict[str, list[float]]:
    """Seconds of one inference, by engine, one value a round."""
    if seconds <= 0 or (rounds is not None and rounds < 1):
        raise ValueError(f"seconds and runs must be positive, got {seconds} and {rounds}")
    repeats = {e.name: _warm_up(e, clock) for e in contestants}
    samples: dict[str, list[float]] = {e.name: [] for e in contestants}
    end = clock() + seconds
    done = 0
    while done < rounds if rounds is not None else done < MIN_ROUNDS or clock() < end:
        first = done % len(contestants)
        for engine in (*contestants[first:], *contestants[:first]):
            sleep(SETTLE_S)
            samples[engine.name].append(_sample(engine, repeats[engine.name], clock))
        done += 1
    return samples


def ratio_interval(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The median of the rounds' ratios, with a 95 % interval from order statistics.

    No assumption on the distribution: the number of values below the median is binomial.
    """
    ratios = sorted(t / o for t, o in zip(theirs, ours, strict=True))
    rank = _interval_rank(len(ratios))
    return Ratio(float(np.median(ratios)), ratios[rank], ratios[len(ratios) - 1 - rank])


def _interval_rank(count: int, error: float = 0.05) -> int:
    """The largest k for which [x_k, x_(n-1-k)] holds the median with probability 1 - error."""
    tail, rank = 0.0, 0
    for below in range(count // 2):
        tail += math.exp(_log_binomial(count, below))
        if 2 * tail > error:
            break
        rank = below
    return rank


def _log_binomial(count: int, below: int) -> float:
    """log(C(count, below) / 2^count)."""
    ways = math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1)
    return ways - count * math.log(2)


def _warm_up(engine: Engine, clock: Clock) -> int:
    """Run the engine, and return how many of its runs make one sample."""
    for _ in range(WARM_UP):
        start = clock()
        engine.run()
        duration = clock() - start
    return max(1, math.ceil(SAMPLE_S / duration)) if duration > 0 else 1


def _sample(engine: Engine, repeats: int, clock: Clock) -> float:
    """Seconds of one run, after an untimed one that fills the caches again."""
    engine.run()
    start = clock()
    for _ in range(repeats):
        engine.run()
    return (clock() - start) / repeats


def _timing(engine: Engine, seconds: list[float]) -> Timing:
    p10, median, p90 = (1e3 * float(v) for v in np.percentile(seconds, (10, 50, 90)))
    return Timing(median, p10, p90, len(seconds), engine.threads, engine.version)
