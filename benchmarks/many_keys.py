"""A million stored keys: exact lookup, inverted lists with exact distances, and rows shared among processes.

    python -m benchmarks.many_keys --json benchmarks/results/many-keys.json

Keys are like hidden states: a common direction, facts in clusters of near questions, radii that overlap. Keys
lie in a file that is mapped. Half of the questions are rewordings of stored facts, half are about none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from dualedit.store.candidates import FlatKeys, InvertedKeys, Nearest, ShardedKeys
from safetensors import safe_open
from safetensors.numpy import save_file

METRIC = "cosine"


def make(place: Path, count: int, width: int, questions: int, seed: int) -> None:
    """Keys [N, P], some of them twice, questions and radii [N], in a file."""
    rng = np.random.default_rng(seed)
    groups = max(2, count // 50)
    common = rng.standard_normal(width, dtype=np.float32) * 2
    centres = rng.standard_normal((groups, width), dtype=np.float32)
    keys = np.empty((count, width), np.float32)
    for start in range(0, count, 1 << 16):
        part = keys[start : start + (1 << 16)]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= 0.35
        part += common
        part += centres[rng.integers(0, groups, len(part))]
    keys[count // 2 : count // 2 + 8] = keys[:8]  # ties, far apart
    stored = keys[rng.integers(0, count, questions // 2)]
    near = stored + 0.1 * rng.standard_normal(stored.shape, dtype=np.float32)
    near[:8] = keys[:8]
    other = common + centres[rng.integers(0, groups, questions - len(near))]
    far = other + 0.35 * rng.standard_normal(other.shape, dtype=np.float32)
    # Between the distance of a rewording and that of a neighbour in the cluster: some radii overlap.
    radius = rng.uniform(0.001, 0.03, count).astype(np.float32)
    save_file({"keys": keys, "query": np.concatenate([near, far]), "radius": radius}, str(place / "keys"))


def opened(place: Path) -> dict[str, torch.Tensor]:
    """The file's tables; keys are mapped."""
    with safe_open(str(place / "keys"), framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in ("keys", "query", "radius")}


def timed(source, query: torch.Tensor) -> tuple[Nearest, dict[str, float]]:
    """What is found, and milliseconds a question: in one batch, and alone (the median of 20)."""
    source.nearest(query[:2])
    began = time.perf_counter()
    found = source.nearest(query)
    batch = (time.perf_counter() - began) / len(query) * 1e3
    alone = []
    for i in range(min(20, len(query))):
        began = time.perf_counter()
        source.nearest(query[i : i + 1])
        alone.append((time.perf_counter() - began) * 1e3)
    return found, {"ms_a_query_in_a_batch": round(batch, 3), "ms_a_query_alone": round(sorted(alone)[10], 3)}


def compared(found: Nearest, whole: Nearest) -> dict[str, float | int]:
    """Decisions beside those of the whole table."""
    fires, same = whole.route >= 0, found.route == whole.route
    missed = found.row != whole.row
    wrong = (found.route >= 0) & (found.route != whole.route)
    return {
        "questions": len(fires), "fire_in_truth": int(fires.sum()),
        "decisions_equal": round(float(same.float().mean()), 5),
        "nearest_missed": int(missed.sum()), "fires_missed": int((fires & (found.route < 0)).sum()),
        "wrong_fires": int(wrong.sum()), "wrong_fires_with_the_nearest_found": int((wrong & ~missed).sum()),
    }  # fmt: skip


def shard(rank: int, world: int, port: int, place: Path, questions: int) -> None:
    """One process of several: its rows, and the decisions of all of them, written by the first."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    given = opened(place)
    count = len(given["keys"])
    first, last = rank * count // world, (rank + 1) * count // world
    own = FlatKeys(given["keys"][first:last], given["radius"][first:last], METRIC, first)
    source, query = ShardedKeys(own), given["query"][:questions].clone()
    found, times = timed(source, query)
    if rank == 0:
        torch.save({**vars(found), "times": times}, place / "sharded.pt")
    dist.destroy_process_group()


def sharded(place: Path, world: int, questions: int) -> dict:
    """Decisions of several processes of this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.many_keys", "--shard"]
    started = [
        subprocess.Popen([*command, str(rank), str(world), str(port), str(place), str(questions)])
        for rank in range(world)
    ]
    if any(process.wait() for process in started):
        raise RuntimeError("a shard failed")
    return torch.load(place / "sharded.pt")


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--lists", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shard", nargs=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shard:
        rank, world, port, place, questions = options.shard
        shard(int(rank), int(world), int(port), Path(place), int(questions))
        return
    import faiss

    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place, options.keys, options.width, options.questions, options.seed)
        given = opened(place)
        keys, query, radius = given["keys"], given["query"], given["radius"]
        mb = keys.numel() * 4 / 1e6
        whole, times = timed(FlatKeys(keys, radius, METRIC), query)
        results: dict = {"exact": {**times, "MB": round(mb, 1)}}
        began = time.perf_counter()
        inverted = InvertedKeys(keys, radius, METRIC, lists=options.lists, probed=16)
        built = time.perf_counter() - began
        size = len(faiss.serialize_index(inverted._index)) / 1e6
        for probed in (4, 16, 64):
            inverted._index.nprobe = probed
            found, times = timed(inverted, query)
            results[f"IVF{options.lists},SQ8 probed {probed}"] = {
                **times, "MB": round(size, 1), "seconds_to_build": round(built, 1), **compared(found, whole)
            }  # fmt: skip
        few = min(128, len(query))
        made = sharded(place, 2, few)
        first = Nearest(whole.route[:few], whole.row[:few], whole.distance[:few])
        found = Nearest(made["route"], made["row"], made["distance"])
        results["2 processes, gloo, exact"] = {
            **made["times"], "MB_each": round(mb / 2, 1), **compared(found, first),
            "distances_equal": bool(torch.equal(found.distance, first.distance)),
        }  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    report = {
        "keys": options.keys, "width": options.width, "machine": platform.processor() or platform.machine(),
        "threads": 1, "load": round(os.getloadavg()[0], 1), "peak_MB": round(peak), "results": results,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
