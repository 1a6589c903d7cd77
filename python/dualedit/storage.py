"""Saving and loading edits so that a crash, a full disk or a wrong folder loses nothing.

The files are PEFT's (`adapter_config.json`, `adapter_model.safetensors`), so that `PeftModel.from_pretrained`
reads them; beside them a journal holds what came since they were written (docs/files.md).
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.config import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .folder import Damaged, View, Writer, find_folder, read_folder
from .folder.lock import if_nobody_writes
from .folder.manifest import CARD, CONFIG, WEIGHTS, read_manifest
from .folder.reading import settings_of, steadily
from .folder.writing import needs_repair
from .memory import Budget, EditMemory
from .memory.rows import IDS, LENGTHS, RECORDS, memories_in
from .runtime.context import runtime_of
from .saved import (
    Origin,
    changes_of,
    commit_rows,
    fill_adapter,
    marks_of,
    memory_state,
    origin_of,
    places_of,
    refuse_foreign,
    settle,
    take_over,
)
from .tuners.adapter import adapter_of
from .tuners.adapters import put_beside, remove_adapter, remove_editors, unwrap_layers
from .tuners.config import EditConfig, check_adapter_file
from .tuners.journaled import read_own, with_journal
from .tuners.model_card import with_count
from .version import __version__


def save_edits(
    model: PeftModel,
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    kind: str = "commit",
) -> None:
    """Save a model's edit adapters with their edits; what is saved is on the disk when this returns.

    In the folder that the edits were loaded from or last saved to, what has changed since is added to the
    journal: an edit costs its own size. What others have saved there meanwhile is taken over first; where two
    have used one number, this model's edit gets another one. In other folders everything is written.

    Args:
        model: from `inject_dualedit`, `inject_balancedit` or `load_edits`. Adapters of other methods on it
            (LoRA) are not saved.
        folder: made if it does not exist; other files in it are left alone. The adapter called "default" lies
            in it, others in folders of their name inside it, as PEFT has it.
        weights: parameter name to the tensor to save instead of the model's own, where that is in pieces
            (FSDP).
        overwrite: replace a folder with edits that this model has not loaded; they are lost.
        kind: "undo" or "redo" for a commit that takes the last one back, or does it again.

    Raises:
        ValueError: not a PeftModel, no edit adapter on it, `folder` is a file, or it holds other edits.
        FolderLocked: somebody else is writing there; names who and since when.
        OSError: the disk refused; the folder is as it was.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}: pass the PeftModel that inject_dualedit returned."
        )
    names = [name for name, config in model.peft_config.items() if isinstance(config, EditConfig)]
    if not names:
        raise ValueError(f"model has no edit adapter, only {sorted(model.peft_config)}: nothing to save.")
    if not os.fspath(folder):
        raise ValueError("folder='' is empty: pass a folder.")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder={str(target)!r} is a file: pass a folder.")
    origin = origin_of(model)
    known = origin.view if origin is not None and origin.is_in(target) else None
    with ExitStack() as stack:
        groups = [adapter_of(model.get_base_model(), name).group for name in names]
        trials = [stack.enter_context(group.trial()) for group in groups]  # nobody changes them meanwhile
        writer = stack.enter_context(Writer(target, known=known).open())
        if not overwrite:
            take_over(model, writer, origin)
        settings, params = _settings(model, names), marks_of(model, names)
        changes = None
        if weights is None and writer.view is not None and origin is not None and origin.is_in(target):
            changes = changes_of(model, origin, writer.view, settings, params)
        if changes is None:
            _save_whole(model, names, writer, weights)
        elif changes:
            writer.commit(changes, commit_rows(model, origin, changes), kind)
        based = {name: bool(len(adapter_of(model.get_base_model(), name).group)) for name in names}
        if changes is not None and origin is not None:
            based = dict(origin.based)
        assert writer.view is not None
        settle(model, Origin(writer.view.slim(), places_of(names), settings, params, based), names)
        for trial in trials:
            trial.kept = True


def is_saved_in(model: PeftModel, folder: str | os.PathLike[str]) -> bool:
    """Whether a model's edits were loaded from a folder or last saved to it."""
    origin = origin_of(model)
    return origin is not None and origin.is_in(Path(folder))


def check_folder(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that a model's edits cannot be saved in.

    Raises:
        ValueError: not a PeftModel, a file, or a folder with edits that the model does not have.
    """
    target = Path(folder)
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}: only the edits of a PeftModel are saved.")
    if not os.fspath(folder) or (target.exists() and not target.is_dir()):
        raise ValueError(f"folder={os.fspath(folder)!r} is no folder: pass a folder.")
    holds = (target / CONFIG).is_file() or find_folder(target) is not None
    if holds and not is_saved_in(model, target):
        refuse_foreign(model, read_folder(target))


def _save_whole(
    model: PeftModel, names: list[str], writer: Writer, weights: Mapping[str, Tensor] | None
) -> None:
    # Embeddings are the base model's; asking whether they were resized would ask the model hub.
    state = {**model.state_dict(), **(weights or {}), **memory_state(model, names)}
    highest = max(adapter_of(model.get_base_model(), name).group.next_id() - 1 for name in names)
    with writer.anew(places_of(names), highest, __version__) as made:
        try:
            model.save_pretrained(
                made, selected_adapters=names, save_embedding_layers=False, state_dict=state
            )
        except SafetensorError as error:
            raise _as_os_error(error, writer.folder) from error


def _as_os_error(error: SafetensorError, folder: Path) -> Exception:
    """What the disk said, out of safetensors' words."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(folder))


def _settings(model: PeftModel, names: list[str]) -> dict[str, str]:
    """The settings of adapters as text; what saving itself notes is left out."""
    passing = ("memory_sizes", "inference_mode", "peft_version")
    found = {}
    for name in names:
        settings = model.peft_config[name].to_dict()
        found[name] = json.dumps(
            {n: v for n, v in settings.items() if n not in passing}, sort_keys=True, default=str
        )
    return found


def refresh_edits(model: PeftModel) -> int:
    """Take over what others have saved in the folder that a model's edits were loaded from or saved to.

    What was changed here and is not saved stays. Nobody waits for anybody.

    Returns:
        how many edits were added, changed or removed.

    Raises:
        ValueError: the edits come from no folder with a journal, or files are damaged.
    """
    origin = origin_of(model)
    if origin is None:
        raise ValueError("model: its edits were neither loaded from a folder nor saved to one.")
    names = list(origin.places)
    with ExitStack() as stack:
        trials = [stack.enter_context(adapter_of(model.get_base_model(), n).group.trial()) for n in names]
        count, view = steadily(origin.view.folder, lambda: origin.refresh(model))
        settle(model, replace(origin, view=view.slim()), [])
        for trial in trials:
            trial.kept = True
    return count


def load_edits(
    base: nn.Module,
    folder: str | os.PathLike[str],
    is_trainable: bool = False,
    adapter_name: str = "default",
    budget: Budget | int | str | None = None,
) -> PeftModel:
    """Put saved edits on a model: `PeftModel.from_pretrained` with the folder checked first.

    What a writer that was stopped has left undone is repaired first, with a warning. The edits of a fallback
    that `Editor` has put beside the adapter come with it.

    Args:
        base: the base model; or a `PeftModel` of it (LoRA, other edits), beside whose adapters these are put.
        folder: from `save_edits` or `save_pretrained`.
        is_trainable: whether the adapter's parameters are to be trained.
        adapter_name: PEFT's name of the adapter on this model.
        budget: how much memory the values of the edits may take, as a `Budget`, in bytes, or as a text such
            as "500MB"; the others are read from the folder's files when they are needed. None: all.

    Returns:
        a `PeftModel` around `base`, or `base` if it is one already.

    Raises:
        ValueError: no such folder, no adapter in it, a file cut short or damaged, a file without some of the
            tensors, edits of another base model, a name that is taken, or a budget that is none. The model is
            left as it was.
    """
    path, held = Path(folder), None if budget is None else Budget.of(budget)
    _repair(path)
    _check_folder(path)
    if not isinstance(base, PeftModel):
        unwrap_layers(base, only_empty=True)  # what transformers' delete_adapter leaves of an editor
    taken = adapter_name in getattr(base, "peft_config", {})
    if taken or (runtime_of(base) is not None and not isinstance(base, PeftModel)):
        raise ValueError(
            f"base is a {type(base).__name__} with an edit adapter already: pass the base model "
            f"(model.unload() gives it back), or the PeftModel and another adapter_name to put the saved "
            f"edits beside the others."
        )
    return steadily(path, lambda: _load(base, path, is_trainable, adapter_name, held))


def _load(
    base: nn.Module, path: Path, is_trainable: bool, adapter_name: str, budget: Budget | None
) -> PeftModel:
    config = _edit_config(path)
    config.budget = budget
    beside = isinstance(base, PeftModel)
    with _as_it_was(base, adapter_name, path):
        if isinstance(base, PeftModel):
            model = base
            _load_beside(model, path, config, adapter_name, is_trainable)
        else:
            config.inference_mode = not is_trainable
            model = PeftModel.from_pretrained(
                base, path, adapter_name, is_trainable=is_trainable, config=config
            )
        _fill(model, path, adapter_name)
        _check_complete(model, path, adapter_name)
        _load_fallback(model, path, adapter_name)
        if not beside:
            _note_origin(model, path, config)
    for each in (config, model.peft_config.get(config.fallback)):
        if isinstance(each, EditConfig) and each.saved_in is not None:
            each.saved_in = (each.saved_in[0].slim(), each.saved_in[1])  # what was read is in the memories
    return model


def _fill(model: PeftModel, path: Path, adapter_name: str) -> None:
    """Read the edits of an adapter that was loaded without them, if it has a budget."""
    config = model.peft_config[adapter_name]
    if config.budget is None:
        return
    if config.saved_in is None:
        fill_adapter(model, adapter_name, path / WEIGHTS, None, "")
        return
    view, place = config.saved_in
    fill_adapter(model, adapter_name, view.own_file(place, WEIGHTS), view, place)
    if read_manifest(view.folder) != view.manifest:
        raise Damaged(f"folder={str(view.folder)!r} was written anew while it was read. Load it again.")


def _note_origin(model: PeftModel, path: Path, config: EditConfig) -> None:
    """Note where a model's edits come from, if it holds all adapters of that folder under their names."""
    view = read_folder(path, records=False) if config.saved_in is None else config.saved_in[0]
    configs = {n: c for n, c in model.peft_config.items() if isinstance(c, EditConfig)}
    if places_of(list(configs)) != view.adapters:
        return
    names = list(configs)
    based = {n: any(s["edits"] for s in (c.memory_sizes or {}).values()) for n, c in configs.items()}
    settings, params = _settings(model, names), marks_of(model, names)
    origin = Origin(view.slim(), places_of(names), settings, params, based)
    settle(model, origin, names)


@contextmanager
def _as_it_was(base: nn.Module, adapter_name: str, path: Path) -> Iterator[None]:
    """Leave a model as it was where loading fails."""
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    beside = isinstance(base, PeftModel)
    try:
        yield
    except BaseException as error:
        if not beside:
            remove_editors(base)
        elif adapter_name in getattr(base, "peft_config", {}):
            remove_adapter(base, adapter_name)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        if isinstance(error, (RuntimeError, SafetensorError)):
            raise ValueError(
                f"folder={str(path)!r}: {WEIGHTS} and {CONFIG} do not fit together or do not fit this "
                f"model: {error}"
            ) from error
        raise


def _repair(path: Path) -> None:
    """Finish what a stopped writer has left undone, if nobody writes now. A damaged folder is left alone."""
    try:
        found = find_folder(path)
        if found is None or not needs_repair(read_folder(found[0], records=False)):
            return
        with if_nobody_writes(found[0]) as free:
            if not free:
                return
        with Writer(found[0]).open():
            pass
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and find_folder(path) is not None:
            warnings.warn(f"folder={str(path)!r} was not repaired: {error}", stacklevel=4)


def _load_beside(
    model: PeftModel, path: Path, config: EditConfig, adapter_name: str, is_trainable: bool
) -> None:
    config.inference_mode = not is_trainable
    put_beside(model, config, adapter_name)
    set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name)


def _edit_config(path: Path) -> EditConfig:
    """The settings of a saved folder, before any model is touched. Raises ValueError."""
    try:
        config = PeftConfig.from_pretrained(str(path))
        if isinstance(config, EditConfig):
            config = type(config).from_pretrained(str(path))
    except (TypeError, KeyError, AttributeError, RecursionError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeError)):
            raise  # of a setting, or of the weights beside it
        raise ValueError(
            f"folder={str(path)!r}: {CONFIG} is damaged ({type(error).__name__}: {error}). Restore it from "
            f"a copy."
        ) from error
    if not isinstance(config, EditConfig):
        raise ValueError(
            f"folder={str(path)!r} holds a {config.peft_type} adapter, not edits: let PEFT load it."
        )
    return config


def _load_fallback(model: PeftModel, path: Path, adapter_name: str) -> None:
    """Put the adapter on the model that holds what this one could not write."""
    config = model.peft_config[adapter_name]
    name = config.fallback
    if name is None:
        return
    folder = (path if adapter_name == "default" or (path / name).is_dir() else path.parent) / name
    config.fallback = None  # until it is there
    if name in model.peft_config:
        raise ValueError(
            f"folder={str(path)!r} comes with a fallback adapter {name!r}, and the model has an adapter of "
            f"this "
            "name. Load it on a model without."
        )
    _check_folder(folder)
    other = _edit_config(folder)
    if config.saved_in is not None and other.saved_in is not None:
        view = config.saved_in[0]
        if view.manifest != other.saved_in[0].manifest:
            raise Damaged(f"folder={str(path)!r} was written anew while it was read. Load it again.")
        other.saved_in = (view, other.saved_in[1])  # both adapters as they were at one moment
    other.budget = config.budget
    _load_beside(model, folder, other, name, False)
    try:
        _fill(model, folder, name)
        _check_complete(model, folder, name)
    except BaseException:
        remove_adapter(model, name)
        raise
    config.fallback = name


def _check_folder(path: Path) -> None:
    found = find_folder(path)
    config, weights = path / CONFIG, path / WEIGHTS
    if found is not None:
        view = read_folder(found[0], records=False)
        config, weights = (view.own_file(found[1], name) for name in (CONFIG, WEIGHTS))
    if not config.is_file():
        what = "holds no adapter_config.json" if path.is_dir() else "does not exist"
        inside = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
        hint = f"pass one of its folders {inside}" if inside else "pass a folder that save_edits has written"
        raise ValueError(f"folder={str(path)!r} {what}: {hint}.")
    if not weights.is_file():
        raise ValueError(f"folder={str(path)!r} holds no {WEIGHTS}: its edits are missing. Save them again.")
    check_adapter_file(weights.parent)


def _tensor_names(file: Path) -> set[str]:
    with safe_open(str(file), framework="pt") as tensors:
        return set(tensors.keys())


def _check_complete(model: PeftModel, path: Path, adapter_name: str) -> None:
    """Refuse a file without some of the adapter's tensors, which PEFT would only warn about."""
    config = model.peft_config[adapter_name]
    tuner = config.method.tuner_class
    adapter = adapter_of(model.get_base_model(), adapter_name)
    held = {id(module) for layer in adapter.layers.values() for module in layer.modules()}
    wanted = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        if id(module) not in held or adapter_name not in parts:
            continue
        tables = list(module.saved_tables) if isinstance(module, EditMemory) else []
        tables += [n for n, _ in module.named_parameters(recurse=False)]
        wanted |= {tuner._remove_adapter_name_from_key(f"{name}.{table}", adapter_name) for table in tables}
    if config.saved_in is None:
        names = _tensor_names(path / WEIGHTS)
    else:
        view, place = config.saved_in
        names = read_own(view, place, _tensor_names)
    missing = sorted(wanted - names)
    if missing:
        raise ValueError(
            f"folder={str(path)!r}: {WEIGHTS} lacks {len(missing)} tensors, the first of them "
            f"{missing[0]!r}. Restore the file from a copy or save the edits again."
        )
    ids = [memory.ids for memory in adapter.group.memories.values()]
    if any(each != ids[0] for each in ids[1:]):
        raise ValueError(f"folder={str(path)!r}: its layers hold different edits; the file is damaged.")
    if config.saved_in is not None:
        adapter.group.first.reserve(config.saved_in[0].highest_id)


def compact_edits(folder: str | os.PathLike[str]) -> int:
    """Put all edits of a folder into its adapters' own files and begin an empty journal. No model is needed.

    Edits that were removed are gone for good then: commits before this one cannot be undone.

    Returns:
        how many commits the journal had.

    Raises:
        ValueError: no edits there, or damaged files. FolderLocked: somebody else is writing.
        OSError: the disk refused; the folder is as it was.
    """
    target = Path(folder)
    read_folder(target, records=False)  # says what is wrong before anything is made
    with Writer(target).open() as writer:
        view = writer.view
        assert view is not None
        with writer.anew(view.adapters, view.highest_id, __version__) as made:
            for name, place in view.adapters.items():
                _write_compact(view, name, made / place)
        return len(view.entries)


def _write_compact(view: View, name: str, made: Path) -> None:
    """An adapter's own files with all its edits in them."""
    made.mkdir(exist_ok=True)
    with safe_open(str(view.own_file(name, WEIGHTS)), framework="pt") as own:
        metadata = own.metadata()
        state = {key: own.get_tensor(key) for key in own.keys()}
    state = with_journal(view, name, state)
    settings = settings_of(view.own_file(name, CONFIG))
    for memory in memories_in(list(state)):
        layer = memory.rpartition(".")[0].removeprefix("base_model.model.")
        sizes = {
            "edits": len(state[f"{memory}.{IDS}"]),
            "tokens": int(state[f"{memory}.{LENGTHS}"].sum()),
            "records": len(state[f"{memory}.{RECORDS}"]),
        }
        settings["memory_sizes"] = {**(settings.get("memory_sizes") or {}), layer: sizes}
    try:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(made / WEIGHTS), metadata)
    except SafetensorError as error:
        raise _as_os_error(error, view.folder) from error
    (made / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    card = view.place(str(Path(view.adapters[name], CARD)))
    if card.is_file():
        text = with_count(card.read_text(encoding="utf-8"), len(view.contents[name]))
        (made / CARD).write_text(text, encoding="utf-8")
