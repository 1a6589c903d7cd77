"""Adapters side by side on one model: adding beside others, switching off, taking off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft import PeftModel, inject_adapter_in_model
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.architectures import plain_name, unwrap
from ..runtime.context import framed, runtime_of
from .config import EditConfig
from .layer import EditLayer


def _drop_runtime(model: nn.Module) -> None:
    runtime = runtime_of(model)
    if runtime is not None and not any(isinstance(module, EditLayer) for module in model.modules()):
        runtime.uninstall()
        del model._dualedit_runtime


def unwrap_layers(model: nn.Module, only_empty: bool = False) -> None:
    """Put the base layers back where edit layers stand; `only_empty`: where no adapter is left on them."""
    # From the inside out: a linear layer may be wrapped inside a decoder layer that is wrapped, too.
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, EditLayer) and not (only_empty and module.configs):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    _drop_runtime(model)


@contextmanager
def lifted_layers(base: nn.Module, but: type[EditLayer] | None = None) -> Iterator[None]:
    """Take the edit layers (except those of class `but`) off inside a block, and put them back around what
    stands in their place then.

    PEFT looks at no module inside a wrapped one: what is injected meanwhile finds the base model's own names.
    """
    lifted = []
    for name, module in reversed(list(base.named_modules())):  # from the inside out
        if isinstance(module, EditLayer) and not (but is not None and isinstance(module, but)):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.base_layer)
            lifted.append((plain_name(name), module))
    try:
        yield
    finally:
        for name, module in lifted:
            parent, _, child = name.rpartition(".")
            place = base.get_submodule(parent)
            # OPT's linear layers hang on its decoder layers, which may have been wrapped meanwhile.
            place = place.base_layer if isinstance(place, EditLayer) else place
            module.base_layer = getattr(place, child)
            setattr(place, child, module)


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Take all edits off a model inside a `with` block, for what PEFT does with adapters of other methods.

    PEFT does not look inside layers that another adapter wraps, as DualEdit wraps whole decoder layers: a
    LoRA that is added would pass those layers over, one that is saved would name the wrapped layers, and
    merging stops at them. Inside the block it finds the model as it is without edits, and the edits come back
    behind it: `with lifted(model): model.save_pretrained("style")`. Not for use while other threads run the
    model.

    Args:
        model: a `PeftModel` whose own adapters are not edits, or a transformers model with adapters of its
            own.

    Raises:
        ValueError: a `PeftModel` of an editor: its edits are all that makes it one.
    """
    base = unwrap(model)
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, EditConfig):
        raise ValueError(
            f"model is a PeftModel of {model.peft_type.value} edits: pass its base model, "
            f"model.get_base_model(), and use PEFT's functions on that."
        )
    configs = getattr(base, "peft_config", {})
    kept = {name: config for name, config in configs.items() if isinstance(config, EditConfig)}
    for name in kept:
        del configs[name]
    try:
        with lifted_layers(base):
            yield
    finally:
        base.peft_config = getattr(base, "peft_config", {})
        base.peft_config.update(kept)


def remove_editors(model: nn.Module) -> None:
    """Take every editor out of a base model, however far its injection had come."""
    unwrap_layers(model)
    configs = getattr(model, "peft_config", {})
    for name in [name for name, config in configs.items() if isinstance(config, EditConfig)]:
        del configs[name]
    if not configs:
        model.__dict__.pop("peft_config", None)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one edit adapter with its edits off a model, whatever other adapters are on it.

    PEFT's `delete_adapter` does the same for adapters of the method that its `PeftModel` was made for; this
    does it for any edit adapter, and leaves no wrapped layer behind that nobody needs (so that a LoRA beside
    it can be merged).

    Args:
        model: a `PeftModel`, or a transformers model with adapters of its own.
        adapter_name: of the edit adapter.

    Raises:
        ValueError: no such edit adapter, or the only adapter of a `PeftModel` (`unload` takes that off).
    """
    base = unwrap(model)
    configs = getattr(base, "peft_config", {})
    if not isinstance(configs.get(adapter_name), EditConfig):
        raise ValueError(f"adapter_name={adapter_name!r}: {_listed(configs, EditConfig)}")
    if isinstance(model, PeftModel) and len(configs) == 1:
        raise ValueError(
            f"adapter_name={adapter_name!r} is the only adapter of this PeftModel: model.unload() takes it "
            f"off and returns the base model."
        )
    _delete_adapter(base, adapter_name)
    if isinstance(model, PeftModel) and adapter_name in model.active_adapters:
        left = [name for name in model.active_adapters if name != adapter_name] or [next(iter(configs))]
        model.base_model.active_adapter, model.active_adapter = left, left[0]
    unwrap_layers(base, only_empty=True)
    if not configs:  # as transformers' own delete_adapter leaves a model
        base.__dict__.pop("peft_config", None)
        base.__dict__.pop("_hf_peft_config_loaded", None)


def _delete_adapter(base: nn.Module, adapter_name: str) -> None:
    for module in list(base.modules()):
        if isinstance(module, EditLayer) and adapter_name in module.configs:
            module.delete_adapter(adapter_name)
    base.peft_config.pop(adapter_name, None)


def _listed(configs: dict[str, PeftConfig], kind: type[PeftConfig]) -> str:
    names = ", ".join(repr(name) for name, config in configs.items() if isinstance(config, kind)) or "none"
    what = "edit adapter" if kind is EditConfig else "adapter"
    return f"no such {what} on this model. There are: {names}."


@contextmanager
def disabled(model: nn.Module, *adapter_names: str) -> Iterator[None]:
    """Switch some of a model's adapters off inside a `with` block, and leave the others as they are.

    `model.disable_adapter()` switches every adapter off. This is for adapters side by side: answer with the
    LoRA but without the edits, or store an edit in one of two active edit adapters by switching the other
    off. Edit adapters are off in this thread (or task) only; for others (LoRA) PEFT keeps a state on the
    layers, which every thread sees.

    Args:
        model: a `PeftModel`, or a transformers model with adapters of its own.
        adapter_names: of edit adapters or of any other PEFT adapters on it.

    Raises:
        ValueError: no such adapter, or one whose weights are merged.
    """
    base = unwrap(model)
    configs = getattr(base, "peft_config", {})
    for name in adapter_names:
        if name not in configs:
            raise ValueError(f"adapter_names={name!r}: {_listed(configs, PeftConfig)}")
    others = [
        module
        for module in base.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, EditLayer)
    ]
    merged = sorted({name for layer in others for name in layer.merged_adapters} & set(adapter_names))
    if merged:
        raise ValueError(f"adapter_names={merged}: merged into the base weights. Unmerge them first.")
    runtime = runtime_of(base)
    with ExitStack() as stack:
        if runtime is not None:
            stack.enter_context(framed(runtime, "disabled", runtime.switched_off() | set(adapter_names)))
        for layer in others:
            stack.callback(setattr, layer, "_active_adapter", layer._active_adapter)
            # Not set_adapter, which would make the parameters of the others trainable.
            layer._active_adapter = [name for name in layer.active_adapters if name not in adapter_names]
        yield


def put_beside(
    model: PeftModel, config: EditConfig, adapter_name: str, low_cpu_mem_usage: bool = False
) -> None:
    """Add an edit adapter to a PeftModel, of whatever method its other adapters are.

    PEFT's own `add_adapter` refuses an adapter of another method.
    """
    if adapter_name in model.peft_config:
        raise ValueError(
            f"model is a {type(model).__name__} with an adapter {adapter_name!r} already: pass the base "
            f"model, or another adapter_name to put this adapter beside it."
        )
    base = model.get_base_model()
    before = dict(model.peft_config)
    try:
        if config.peft_type == model.peft_type:
            model.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(config, base, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    except BaseException:
        _delete_adapter(base, adapter_name)
        unwrap_layers(base, only_empty=True)
        model.peft_config.clear()
        model.peft_config.update(before)
        raise
