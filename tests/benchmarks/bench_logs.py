"""How long does a large tuning log take to open, to ask, to read whole and to append to?

The log has invented records of 200 layers with 500 configurations each.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.tuning_logs.index import Site
from topiarist.tuning_logs.record import PACKAGES, MeasureInput, TargetKey, TuningRecord
from topiarist.tuning_logs.store import TuningLog

LAYERS, CONFIGS = 200, 500
REPEATS = 7
ASKED = 300
LAYOUT = "lanes(14x14@2x4:7x4 halo(1, 1, 1, 1)) channels 64 of 64"


def records() -> Iterator[TuningRecord]:
    """The log's content."""
    rng = random.Random(0)
    for layer in range(LAYERS):
        sparsity = SparsitySignature(rng.randrange(50, 300) / 1000, "unstructured", (10, 29, 40))
        workload = ConvWorkload(
            *(1, 64, 7 + layer % 50, 14, 64 * (1 + layer // 50), (3, 3), (1, 1), (1, 1, 1, 1)),
            *((1, 1), 1, sparsity, (0.0, None)),
        )
        for number in range(CONFIGS):
            what = MeasureInput(
                workload=workload.to_json(),
                kernel="direct_sparse",
                kernel_version=1,
                config={"rows": 1, "cols": number, "out_block": 1, "in_block": 32},
                input_layout=LAYOUT,
                output_layout=LAYOUT,
                residual_layout="none",
                target=TargetKey("x86", "avx2", 8, "Some CPU @ 2.10GHz", 1),
                versions=dict.fromkeys(PACKAGES, "1.0.0"),
            )
            yield TuningRecord(what, tuple(rng.uniform(1e-4, 2e-4) for _ in range(REPEATS)))


def timed(act: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def results(path: Path) -> dict[str, float]:
    """The figures, by what they say."""
    TuningLog(path).append(records())
    total = LAYERS * CONFIGS
    wanted = set(random.Random(1).sample(range(total), ASKED))
    some = [record for number, record in enumerate(records()) if number in wanted]
    asked = [record.input for record in some]
    opening = [timed(lambda: TuningLog(path).find(asked[0])) for _ in range(REPEATS)]
    log = TuningLog(path)
    log.find(asked[0])
    first = [timed(lambda what=what: log.find(what)) for what in asked]
    again = [timed(lambda what=what: log.find(what)) for what in asked]
    sites = [timed(lambda what=what: log.best(Site.of(what))) for what in asked[::15]]
    appends = [timed(lambda one=one: log.append([one])) for one in some]
    return {
        "records": total,
        "megabytes": path.stat().st_size / 1e6,
        "open and first lookup, s": statistics.median(opening),
        "open and first lookup, slowest, s": max(opening),
        "lookup, ms": 1e3 * statistics.median(first),
        "lookup, slowest, ms": 1e3 * max(first),
        "lookup repeated, ms": 1e3 * statistics.median(again),
        f"best of {CONFIGS} records, ms": 1e3 * statistics.median(sites),
        "append of one record, ms": 1e3 * statistics.median(appends),
        "read whole, s": timed(lambda: sum(1 for _ in log.read())),
    }


def main() -> None:
    """Measure, show, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    question = "How long does a large tuning log take?"
    with tempfile.TemporaryDirectory() as folder:
        found = results(Path(folder) / "x86.jsonl")
    table = Table("", "", title=question)
    for name, value in found.items():
        table.add_row(name, f"{value:,.3f}")
    Console().print(table)
    if opts.json:
        opts.json.write_text(json.dumps({"question": question, **measure.setting(), **found}))


if __name__ == "__main__":
    main()
