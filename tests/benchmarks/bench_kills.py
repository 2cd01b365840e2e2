"""A tuner is killed with SIGKILL at random moments, a thousand times: what does the log lose?

Short tasks: an invented measurer, so that nearly all the time goes into writing and reading the
log. Every tuner tells what it has finished; the log has to have all of it and has to be readable.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from topiarist.compiler.graph import Conv, Graph, Value
from topiarist.compiler.parts import Parts
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.tune import TuneOptions, Tuner, find_tasks
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant
from topiarist.targets import registry
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

LONGEST_S = 0.3  # that a tuner lives
FULL = 400  # records, after which a new log is begun


class Invented:
    """Takes no time; a kernel's time follows from its knobs."""

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        """Every variant is fine."""
        times = [sum(map(int, vars(variant.config).values())) * 1e-6 for variant in variants]
        return Batch(tuple(Outcome((seconds,)) for seconds in times), (1e-5,))


class Told(TuningLogs):
    """Logs that tell through a pipe how many records were finished."""

    def __init__(self, log: TuningLog, pipe: int) -> None:
        super().__init__(log)
        self.pipe = pipe

    def append(self, records: Any) -> None:
        """Append, then tell their ids."""
        kept = list(records)
        super().append(kept)
        os.write(self.pipe, "".join(f"{record.id}\n" for record in kept).encode())


def one_conv() -> Graph:
    """A layer with a few hundred candidates."""
    values = {"x": Value("x", (1, 64, 28, 28)), "y": Value("y", (1, 64, 28, 28))}
    chance = np.random.default_rng(0)
    weight = chance.standard_normal((64, 64, 3, 3)) * (chance.random((64, 64, 3, 3)) < 0.1)
    node = Conv(
        name="conv",
        inputs=("x",),
        output="y",
        weight=weight.astype(np.float32),
        bias=np.zeros(64, np.float32),
        padding=(1, 1, 1, 1),
    )
    return Graph((node,), values, ("x",), ("y",))


def tune(graph: Graph, logs: TuningLogs) -> None:
    """Until everything is measured; without the model, for it would only take time."""
    spec = registry.get("x86-avx2")
    options = TuneOptions(trials=10**6, strategy="evolution")
    recorded = Recorded(logs, Device.named(spec, 1))
    tasks, layouts = find_tasks(graph, Parts(spec, 1), recorded, options)
    Tuner(
        *(tasks, layouts, logs, Invented(), options),
        deadline=float("inf"),
        clock=time.monotonic,
        progress=lambda step: None,
    ).run()


def kill_once(graph: Graph, log: Path, after_s: float) -> list[str]:
    """Start a tuner, kill it, and return the ids of the records that it had finished."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        tune(graph, Told(TuningLog(log), writes))
        os._exit(0)
    os.close(writes)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reads) as pipe:
        return pipe.read().split()


def run(kills: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Kill so many tuners; what was finished, lost, broken, torn and in vain."""
    graph = one_conv()
    chance = random.Random(seed)
    counts = dict.fromkeys(("kills", "finished", "lost", "broken", "torn", "records"), 0)
    number, finished = 0, list[str]()
    while counts["kills"] < kills:
        log = folder / f"{number}.jsonl"
        finished += kill_once(graph, log, chance.uniform(0, LONGEST_S))
        counts["kills"] += 1
        reader = TuningLog(log)
        there = {record.id for record in reader.read()}
        counts["lost"] += len(set(finished) - there)
        counts["broken"] += len(reader.defects)
        if len(there) >= FULL or counts["kills"] == kills:
            counts["finished"] += len(finished)
            counts["records"] += len(there)
            counts["torn"] += Path(f"{log}.torn").exists()
            number, finished = number + 1, []
    return counts


def main() -> None:
    """Kill, count, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the counts here")
    opts = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(opts.kills, Path(folder))
    Console().print(counts)
    if opts.json:
        opts.json.write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
