"""Step 5: what was trained, in float16, into the package: `python/dualedit/smol/weights/smol.safetensors`.

python recipes/smol/export.py && dualedit fetch smol    # the model in the cache is assembled anew
"""

import torch
from common import WORK, load_parts
from dualedit.smol.fetch import WEIGHTS
from lean import signature
from reader import SIGN
from safetensors.torch import save_file
from tower import tuned
from vocabulary import Vocabulary


def is_parameter(name: str) -> bool:
    """Whether an entry is trained, not a frozen statistic of a batch norm."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def main():
    tower = torch.load(WORK / "tower.pt", weights_only=True)["tower"]
    weights = {f"tower.{k}": v for k, v in tower.items() if tuned(k) and is_parameter(k)}
    vocabulary = Vocabulary()
    vocabulary.load_state_dict(torch.load(WORK / "vocabulary.pt", weights_only=True)["vocabulary"])
    weights |= vocabulary.parts(SIGN * signature(load_parts()[2]))
    for layer, parts in torch.load(WORK / "reader.pt", weights_only=True)["neurons"].items():
        weights |= {f"neurons.{layer}.{name}": value for name, value in parts.items()}
    weights = {k: v.detach().half().contiguous() for k, v in weights.items()}
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(weights, WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
