"""nearest_key against faiss, torch.cdist and the matrix product trick.

    python -m benchmarks.bench_nearest_key --json benchmarks/results/<machine>.json

Every rival answers the same question, the nearest key of each query and its distance. Ours also applies the
radius. Queries are near a key (a stored edit is asked for; most keys can be given up early), or as far
from all keys as the keys are from each other. With --massive the keys look like hidden states, with a few
activations of size 1e3 that all share. A rival whose argmin or distance is wrong is not timed: there, the
expansion |q|^2 - 2 q.k + |k|^2 is.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.common import Benchmark, Rival, arguments, bandwidth
from dualedit_kernels import backend, nearest_key

SHAPES = [(1_000, 4096), (100_000, 1024), (100_000, 4096)]
BATCHES = (1, 8, 32)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--massive", action="store_true", help="keys with massive activations, as hidden states have"
    )
    parser.add_argument("--shapes", help="numbers of keys x dimensions, e.g. 1000x4096,100000x1024")
    options = parser.parse_args()
    benchmark = Benchmark("nearest_key", options)
    speed = bandwidth() if options.device == "cpu" else None
    shapes = SHAPES[:1] if options.quick else SHAPES
    if options.shapes is not None:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes.split(",")]
    for count, dim in shapes:
        for batch, near in itertools.product(BATCHES, (False, True)):
            shape = {"batch": batch, "keys": count, "dim": dim, "near": near, "massive": options.massive}
            benchmark.compare(shape, rivals(*problem(shape, options.device), options), floors(shape, speed))
    benchmark.finish()


def floors(shape: dict, speed: float | None) -> dict[str, float]:
    """Milliseconds to read the keys once from memory."""
    values = shape["keys"] * shape["dim"]
    if speed is None or values * 2 < 1 << 28:
        return {}  # the keys may stay in a cache
    return {
        f"read {name} keys once": values * size / speed * 1e3 for name, size in (("fp32", 4), ("bf16", 2))
    }


def problem(shape: dict, device: str) -> tuple[Tensor, Tensor]:
    """Queries, near some key each or far from all, and keys, in fp32."""
    batch, count, dim = shape["batch"], shape["keys"], shape["dim"]
    generator = torch.Generator().manual_seed(0)

    def states(rows: int) -> Tensor:
        result = torch.randn(rows, dim, generator=generator).mul_(0.05)
        if shape["massive"]:
            result[:, [dim // 7, dim // 2]] += torch.tensor([1000.0, -2500.0])
        return result

    keys = states(count).to(torch.bfloat16).float()  # every dtype then holds the same keys
    query = states(batch)
    if shape["near"]:
        chosen = torch.randint(0, count, (batch,), generator=generator)
        query = keys[chosen] + torch.randn(batch, dim, generator=generator) * 0.01
    return query.to(device), keys.to(device)


def rivals(query: Tensor, keys: Tensor, options) -> list[Rival]:
    """Ours in every dtype and implementation, then the others."""
    want_index, want_distance = exact(query, keys)

    def wrong(result: tuple[Tensor, Tensor]) -> str | None:
        index, distance = result
        bad = int((index != want_index).sum())
        if bad:
            return f"{bad} of {len(index)} nearest keys are wrong"
        error = float(((distance - want_distance).abs() / want_distance).max())
        return f"distance is off by {error:.1%}" if error > 1e-3 else None

    radius = torch.full((len(keys),), torch.inf, device=keys.device)
    narrow = keys.to(torch.bfloat16)
    result = []
    for dtype, held in (("float32", keys), ("bfloat16", narrow)):
        choice = backend.explain("nearest_key", keys.device.type, held.dtype)
        name = f"nearest_key ({choice.implementation.name})"
        result.append(
            Rival(
                f"{name}" if dtype == "float32" else f"{name} bf16 keys",
                dtype,
                _ours(query, held, radius),
                wrong,
            )
        )
    result += _faiss(query, keys, wrong, options) if keys.device.type == "cpu" else []
    squares = keys.square().sum(1)
    result.append(Rival("torch matmul trick", "float32", lambda: _trick(query, keys, squares), wrong))
    if keys.numel() * len(query) <= 1 << 26:
        result.append(Rival("torch.cdist", "float32", lambda: _smallest(torch.cdist(query, keys)), wrong))
    return result


def exact(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest keys and distances in float64, where even the expansion keeps ten digits."""
    query = query.double()
    parts = []
    for block in keys.split(1 << 14):
        block = block.double()
        parts.append(torch.addmm(block.square().sum(1), query, block.t(), alpha=-2).min(1))
    smallest, part = torch.stack([part.values for part in parts]).min(0)
    index = torch.stack([part.indices for part in parts]).gather(0, part[None])[0] + part * (1 << 14)
    return index, (smallest + query.square().sum(1)).clamp(min=0).sqrt()


def _ours(query: Tensor, keys: Tensor, radius: Tensor):
    return lambda: nearest_key(query, keys, radius)


def _trick(query: Tensor, keys: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    distance = torch.addmm(squares, query, keys.t(), alpha=-2)  # |k|^2 - 2 q.k
    smallest, index = distance.min(1)
    return index, (smallest + query.square().sum(1)).clamp(min=0).sqrt()


def _smallest(distance: Tensor) -> tuple[Tensor, Tensor]:
    smallest, index = distance.min(1)
    return index, smallest


def _faiss(query: Tensor, keys: Tensor, wrong, options) -> list[Rival]:
    try:
        import faiss
    except ImportError:
        print("    faiss is not installed (pip install faiss-cpu): left out")
        return []
    faiss.omp_set_num_threads(options.threads)
    flat = faiss.IndexFlatL2(keys.shape[1])
    flat.add(keys.numpy())
    rows = query.numpy()
    default = faiss.cvar.distance_compute_blas_threshold

    def search() -> tuple[Tensor, Tensor]:
        squared, index = flat.search(rows, 1)
        return torch.from_numpy(index[:, 0]), torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt()

    def blas(on: bool) -> None:
        faiss.cvar.distance_compute_blas_threshold = 1 if on else default

    return [
        Rival("faiss IndexFlatL2", "float32", search, wrong),
        Rival("faiss IndexFlatL2, BLAS forced", "float32", search, wrong, blas),
    ]


if __name__ == "__main__":
    main()
