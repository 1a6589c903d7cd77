"""From names of methods to methods to measure: the one place that knows how each of them is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .loading import Start, is_smol, load_base, start_editor

if TYPE_CHECKING:
    from ..evaluation import Method

EDITORS = ("dualedit", "balancedit")
_PUBLISHED = 0.8  # tau of DualEdit's published code, for models like its own
_TRAINING_FACTS, _TRAINING_SEED = 24, 4242


@dataclass(frozen=True)
class Source:
    """The model that is edited, and what its editors need.

    Attributes:
        model: folder of a Hugging Face model, or None for the embedded one.
        adapter: trained DualEdit adapters for `model`.
        layer: linear layer for BalancEdit in `model`.
        weights: folder of a retrained embedded model and its editors, or None for those of the package.
        networks: folder of fitted baselines for `model`, one folder each by name, as
            `dualedit.baselines.fit_baseline` writes it.
        published: whether the gate that sees the answer is asked too.
        published_threshold: tau of that gate; None fits it on training facts of the embedded world, and takes
            the published code's for a model of the user's own.
    """

    model: Path | None = None
    adapter: Path | None = None
    layer: str | None = None
    weights: Path | None = None
    published: bool = False
    published_threshold: float | None = None
    networks: Path | None = None

    def check(self) -> None:
        """Refuse options that do not fit together. Raises ValueError."""
        if self.model is None and (self.adapter or self.layer):
            raise ValueError("--adapter and --layer are for a model of your own: pass --model too.")
        if self.model is None and self.networks:
            raise ValueError("--networks is for a model of your own: pass --model too.")
        if self.model is not None and self.weights is not None:
            raise ValueError("--weights is a retrained embedded model: leave out --model, or --weights.")
        if self.published_threshold is not None and not -1 <= self.published_threshold <= 1:
            raise ValueError(f"--published-threshold {self.published_threshold}: a cosine lies in [-1, 1].")


def known_methods() -> tuple[str, ...]:
    """Every name that `open_methods` takes, beside "all"."""
    return (*EDITORS, *_baselines())


def choose_methods(text: str | None, source: Source) -> tuple[str, ...]:
    """The methods to measure.

    Args:
        text: names, such as "dualedit,grace"; "all" for every method for which `source` has what it needs;
            None for those of the two editors.

    Raises:
        ValueError: an unknown name, one that is named twice, or none.
    """
    if text is None:
        editors = tuple(name for name in EDITORS if _lacks(name, source) is None)
        if not editors:
            raise ValueError("--model: pass --adapter DIR for DualEdit, --layer NAME for BalancEdit.")
        return editors
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = known_methods()
    if names == ["all"]:
        names = [name for name in known if _lacks(name, source) is None]
        if not names:
            raise ValueError("--methods all: with --model, pass --adapter DIR for DualEdit or --layer NAME.")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"--methods {text}: choose from {', '.join(known)}, or all.")
    if len(set(names)) < len(names):
        raise ValueError(f"--methods {text}: name each method once.")
    for name in names:
        lacking = _lacks(name, source)
        if lacking is not None:
            raise ValueError(f"--methods {name}: {lacking}.")
    return tuple(names)


def open_methods(names: Sequence[str], source: Source) -> Iterator[Method]:
    """The methods one after the other, each on a model of its own, without edits.

    Args:
        names: from `choose_methods`.
    """
    for name in names:
        yield _open_editor(name, source) if name in EDITORS else _open_baseline(name, source)


def _lacks(name: str, source: Source) -> str | None:
    """What a method would need beside `source`, in words."""
    if source.model is None:
        return _lacks_of_embedded(name, source)
    if name in EDITORS and is_smol(source.model):
        return None
    if name in _fitted() and not (source.networks and (source.networks / name).is_dir()):
        return (
            "it has to be fitted to training facts first; pass --networks DIR, of which DIR/"
            f"{name} is what dualedit.baselines.fit_baseline({name!r}, ...) wrote"
        )
    if name in ("dualedit", "visedit") and source.adapter is None:
        return "DualEdit's adapters have to be trained for a model first; pass them with --adapter DIR"
    if name == "balancedit" and source.layer is None:
        return "pass the linear layer to edit with --layer NAME (as layers.20.mlp.up_proj)"
    return None


def _lacks_of_embedded(name: str, source: Source) -> str | None:
    if name in EDITORS:
        return None
    from ..toy.baselines import lacks_settings

    return lacks_settings(name, _folders(source)[1])


def _open_editor(name: str, source: Source) -> Method:
    from ..evaluation import EditorMethod

    if source.model is None:
        from ..toy.editors import load_editor

        vlm, editors = _folders(source)
        editor = load_editor(name, vlm=vlm, weights=editors, fallback=False)
    else:
        adapter, layer = (source.adapter, None) if name == "dualedit" else (None, source.layer)
        start = Start(name, adapter, layer, fallback="none")  # what is measured is one method
        editor = start_editor(source.model, start)
    return EditorMethod(editor, name, _threshold(name, editor, source))


def _threshold(name: str, editor, source: Source) -> float:
    if source.published_threshold is not None:
        return source.published_threshold
    if not source.published or source.model is not None or name != "dualedit":
        return _PUBLISHED
    from ..evaluation import fit_published_threshold
    from ..toy.samples import edit_samples
    from ..toy.world import World

    return fit_published_threshold(editor, edit_samples(World(0), "train", _TRAINING_FACTS, _TRAINING_SEED))


def _baselines() -> tuple[str, ...]:
    from ..baselines import BASELINES

    return BASELINES


def _fitted() -> tuple[str, ...]:
    from ..baselines import FITTED

    return FITTED


def _open_baseline(name: str, source: Source) -> Method:
    if source.model is None:
        from ..toy.baselines import load_baseline

        vlm, editors = _folders(source)
        return load_baseline(name, vlm=vlm, weights=editors)
    from ..baselines import RetrievalSettings, VisEditSettings, open_baseline, saved_settings

    settings = None
    if name == "visedit":
        settings = VisEditSettings(adapters=source.adapter)
    elif name == "retrieval" and is_smol(source.model):
        from ..smol.editors import EDITORS as OF_SMOL

        settings = RetrievalSettings(adapter=OF_SMOL / "balancedit")  # its pooled key
    elif name in _fitted():
        settings = saved_settings(name, source.networks / name)
    base, processor = load_base(source.model)
    return open_baseline(name, base, processor, settings)


def _folders(source: Source) -> tuple[Path | None, Path | None]:
    """Folders of the embedded model and its editors, as `demo --retrain` writes them; None: the package's."""
    return (None, None) if source.weights is None else (source.weights / "vlm", source.weights / "editors")
