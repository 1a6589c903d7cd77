"""What saved edits survive, and how fast it goes with many of them.

    python -m benchmarks.durability [--quick] [--only kills,mutations] --json FILE

`--quick` takes about two minutes. Each part prints one line and writes its figures under its name; a part
with faults says what they were. The exit code is 1 where a fault was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.durability import concurrent, kills, many, mutations

# Part to what runs it, and its size in the full and in the quick run.
PARTS = {
    "kills": (kills.run, 500, 60),
    "truncations": (kills.truncations, 1, 1),
    "processes": (concurrent.processes, 60, 6),
    "mutations": (mutations.run, 100_000, 1_000),
    "threads": (concurrent.threads, 300, 10),
    "many": (many.run, 100_000, 2_000),
    "sequential": (many.sequential, 1_000, 10),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts from the command line; 1 where one found a fault."""
    parser = argparse.ArgumentParser(prog="benchmarks.durability", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, about two minutes")
    parser.add_argument("--only", metavar="A,B", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="sizes times this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(PARTS)
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, faults = {}, 0
    for name in chosen:
        work, full, quick = PARTS[name]
        size = max(1, round((quick if options.quick else full) * options.scale))
        began = time.perf_counter()
        figures = work(size, options.seed)
        figures["seconds"] = round(time.perf_counter() - began, 1)
        found[name] = figures
        faults += len(figures.get("faults", ()))
        print(f"{name}: {json.dumps(figures)}", flush=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if options.json is not None:
        report = {"machine": machine, "quick": options.quick, "seed": options.seed, "parts": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
