"""Step 4: what was trained, in float16, into the package: `python/dualedit/smol/weights/smol.safetensors`.

python recipes/smol/export.py && dualedit fetch smol    # the model in the cache is assembled anew
"""

import torch
from common import WORK
from dualedit.smol.fetch import WEIGHTS
from safetensors.torch import save_file
from tower import tuned


def is_parameter(name: str) -> bool:
    """Whether an entry is trained, not a frozen statistic of a batch norm."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def main():
    tower = torch.load(WORK / "tower.pt", weights_only=True)
    reader = torch.load(WORK / "reader.pt", weights_only=True)
    weights = {f"projector.{k}": v for k, v in reader["projector"].items()}
    weights |= {f"tower.{k}": v for k, v in tower["tower"].items() if tuned(k) and is_parameter(k)}
    for layer, parts in reader["neurons"].items():
        weights |= {f"neurons.{layer}.{name}": value for name, value in parts.items()}
    weights = {k: v.half().contiguous() for k, v in weights.items()}
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(weights, WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
