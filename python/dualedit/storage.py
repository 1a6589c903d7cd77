"""Saving and loading edits so that a crash, a full disk or a wrong folder loses nothing.

The files are PEFT's (`adapter_config.json`, `adapter_model.safetensors`), so that `PeftModel.from_pretrained`
reads them; they are written beside the old ones and put in their place only when they are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.config import PeftConfig
from safetensors import safe_open
from torch import Tensor, nn

from .files import replacing
from .runtime.context import runtime_of
from .tuners.adapter import adapter_of
from .tuners.adapters import put_beside, remove_adapter, remove_editors, unwrap_layers
from .tuners.config import EditConfig, check_adapter_file

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def save_edits(
    model: PeftModel, folder: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Save a model's edit adapters with their edits; the folder holds the old edits or the new ones, whole.

    Args:
        model: from `inject_dualedit`, `inject_balancedit` or `load_edits`. Adapters of other methods on it
            (LoRA) are not saved.
        folder: made if it does not exist; other files in it are left alone. The adapter called "default" lies
            in it, others in folders of their name inside it, as PEFT has it.
        weights: parameter name to the tensor to save instead of the model's own, where that is in pieces
            (FSDP).

    Raises:
        ValueError: not a PeftModel, no edit adapter on it, or `folder` is a file.
        OSError: the disk refused; the folder is as it was.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}: pass the PeftModel that inject_dualedit returned."
        )
    names = [name for name, config in model.peft_config.items() if isinstance(config, EditConfig)]
    if not names:
        raise ValueError(f"model has no edit adapter, only {sorted(model.peft_config)}: nothing to save.")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder={str(target)!r} is a file: pass a folder.")
    with replacing(target, last=_CONFIG) as made:
        # Embeddings are the base model's; asking whether they were resized would ask the model hub.
        state = None if weights is None else {**model.state_dict(), **weights}
        model.save_pretrained(made, selected_adapters=names, save_embedding_layers=False, state_dict=state)


def load_edits(
    base: nn.Module,
    folder: str | os.PathLike[str],
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """Put saved edits on a model: `PeftModel.from_pretrained` with the folder checked first.

    The edits of a fallback that `Editor` has put beside the adapter come with it.

    Args:
        base: the base model; or a `PeftModel` of it (LoRA, other edits), beside whose adapters these are put.
        folder: from `save_edits` or `save_pretrained`.
        is_trainable: whether the adapter's parameters are to be trained.
        adapter_name: PEFT's name of the adapter on this model.

    Returns:
        a `PeftModel` around `base`, or `base` if it is one already.

    Raises:
        ValueError: no such folder, no adapter in it, a file cut short, a file without some of the tensors,
            edits of another base model, or a name that is taken. The model is left as it was.
    """
    path = Path(folder)
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
    _edit_config(path)
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    beside = isinstance(base, PeftModel)
    try:
        if beside:
            model = base
            _load_beside(model, path, adapter_name, is_trainable)
        else:
            model = PeftModel.from_pretrained(base, path, adapter_name, is_trainable=is_trainable)
        _check_complete(model, path, adapter_name)
        _load_fallback(model, path, adapter_name)
    except BaseException as error:
        if not beside:
            remove_editors(base)
        elif adapter_name in getattr(base, "peft_config", {}):
            remove_adapter(base, adapter_name)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        if isinstance(error, RuntimeError):
            raise ValueError(
                f"folder={str(path)!r}: {_WEIGHTS} and {_CONFIG} do not fit together or do not fit this "
                f"model: {error}"
            ) from error
        raise
    return model


def _load_beside(model: PeftModel, path: Path, adapter_name: str, is_trainable: bool) -> None:
    config = _edit_config(path)
    config.inference_mode = not is_trainable
    put_beside(model, config, adapter_name)
    set_peft_model_state_dict(model, load_peft_weights(str(path)), adapter_name)


def _edit_config(path: Path) -> EditConfig:
    """The settings of a saved folder, before any model is touched. Raises ValueError."""
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (TypeError, KeyError, AttributeError, RecursionError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeError)):
            raise  # of a setting, or of the weights beside it
        raise ValueError(
            f"folder={str(path)!r}: {_CONFIG} is damaged ({type(error).__name__}: {error}). Restore it from "
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
    _load_beside(model, folder, name, False)
    try:
        _check_complete(model, folder, name)
    except BaseException:
        remove_adapter(model, name)
        raise
    config.fallback = name


def _check_folder(path: Path) -> None:
    if not (path / _CONFIG).is_file():
        what = "holds no adapter_config.json" if path.is_dir() else "does not exist"
        inside = sorted(file.parent.name for file in path.glob(f"*/{_CONFIG}"))
        hint = f"pass one of its folders {inside}" if inside else "pass a folder that save_edits has written"
        raise ValueError(f"folder={str(path)!r} {what}: {hint}.")
    if not (path / _WEIGHTS).is_file():
        raise ValueError(f"folder={str(path)!r} holds no {_WEIGHTS}: its edits are missing. Save them again.")
    check_adapter_file(path)


def _check_complete(model: PeftModel, path: Path, adapter_name: str) -> None:
    """Refuse a file without some of the adapter's tensors, which PEFT would only warn about."""
    # Embeddings are the base model's; asking whether they were resized would ask the model hub.
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    with safe_open(str(path / _WEIGHTS), framework="pt") as tensors:
        missing = sorted(set(wanted) - set(tensors.keys()))
    if missing:
        raise ValueError(
            f"folder={str(path)!r}: {_WEIGHTS} lacks {len(missing)} tensors, the first of them "
            f"{missing[0]!r}. Restore the file from a copy or save the edits again."
        )
    group = adapter_of(model.get_base_model(), adapter_name).group
    if len({tuple(memory.ids) for memory in group.memories.values()}) > 1:
        raise ValueError(f"folder={str(path)!r}: its layers hold different edits; the file is damaged.")
