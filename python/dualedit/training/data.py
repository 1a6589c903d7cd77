"""The edits of a training run, from the files that its recipe names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..data import EditSample
from ..datasets import load_samples
from .recipe import Recipe


def load_edits_to_train(
    recipe: Recipe, say: Callable[[str], None] = print
) -> tuple[Sequence[EditSample], Sequence[EditSample]]:
    """Training and held-out edits of a recipe's files.

    Without a file of their own, held-out edits are the last of the data: `held_out_edits`, at most a tenth.
    Edits of one image should then lie together in the file, or the held-out loss flatters.

    Raises:
        ValueError: no data named, bad rows, missing images (see `dualedit.datasets.load_samples`).
        FileNotFoundError: no such file.
    """
    if recipe.data is None:
        raise ValueError("data=None: name the file with the edits to train on (--data FILE).")

    roots = None if recipe.image_root is None else recipe.image_root.split(os.pathsep)

    def read(path: str, limit: int | None) -> Sequence[EditSample]:
        found = load_samples(path, recipe.format, roots, recipe.skip_bad, recipe.prompt_template, limit)
        if found.skipped:
            say(f"{len(found.skipped)} bad rows of {path} are left out; the first: {found.skipped[0]}")
        return found

    samples = read(recipe.data, recipe.limit)
    if recipe.held_out is not None:
        return samples, read(recipe.held_out, recipe.held_out_edits or None) if recipe.held_out_edits else []
    count = min(recipe.held_out_edits, len(samples) // 10)
    if count == 0:
        return samples, []
    return samples[: len(samples) - count], samples[len(samples) - count :]
