"""The edits of a training run, from the files that its recipe names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..data import EditSample
from ..datasets import load_samples
from ..models.images import ImageSource
from .recipe import Recipe

# Without a number in the recipe: so many edits are held out, at most a tenth of the data.
HELD_OUT_EDITS = 64


def load_edits_to_train(
    recipe: Recipe, say: Callable[[str], None] = print
) -> tuple[Sequence[EditSample], Sequence[EditSample]]:
    """Training and held-out edits of a recipe's files.

    Without a file of their own, held-out edits are the last of the data. Edits of one image should then lie
    together in the file, or the held-out loss flatters.

    Raises:
        ValueError: no data named, fewer edits than are to be held out, bad rows, missing images (see
            `dualedit.datasets.load_samples`).
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

    samples, wanted = read(recipe.data, recipe.limit), recipe.held_out_edits
    if wanted == 0:
        return samples, []
    if recipe.held_out is not None:
        held_out = read(recipe.held_out, HELD_OUT_EDITS if wanted is None else wanted)
        if wanted is not None and len(held_out) < wanted:
            raise ValueError(
                f"held_out_edits={wanted}: {recipe.held_out} holds {len(held_out)}. Pass fewer, or null."
            )
        return samples, held_out
    if wanted is not None and wanted >= len(samples):
        raise ValueError(
            f"held_out_edits={wanted}: there are {len(samples)} edits, and none would be left to train on. "
            "Pass fewer, or name a file with held_out."
        )
    count = min(HELD_OUT_EDITS, len(samples) // 10) if wanted is None else wanted
    return samples[: len(samples) - count], samples[len(samples) - count :]


def fingerprint_of(samples: Sequence[EditSample]) -> str:
    """A short text that changes with any question, answer or picture of a run's training edits.

    Pictures count by the content of their files, each read once. Samples that are drawn when they are asked
    for can say it themselves, by an attribute `fingerprint`.
    """
    own = getattr(samples, "fingerprint", None)
    if own is not None:
        return own
    digest, pictures = hashlib.sha256(), {}

    def add(source: ImageSource, *texts: str | None) -> None:
        digest.update("\0".join(map(str, texts)).encode())
        if not isinstance(source, str):
            digest.update(_digest_of(source))
            return
        if source not in pictures:
            pictures[source] = _digest_of(source)
        digest.update(pictures[source])

    for sample in samples:
        request = sample.request
        add(request.image_source, request.prompt, request.target, *sample.rephrases)
        for probes in (sample.generality, sample.locality):
            for kind, each in sorted(probes.items()):
                for probe in each:
                    add(probe.image_source, kind, probe.prompt, probe.answer)
    return f"{len(samples)}:{digest.hexdigest()[:16]}"


def _digest_of(source: ImageSource) -> bytes:
    if source is None:
        return b"none"
    if isinstance(source, str):
        source = Path(source).read_bytes()
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    return hashlib.sha256(f"{source.mode} {source.size}".encode() + source.tobytes()).digest()
