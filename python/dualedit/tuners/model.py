"""The editors as PEFT methods: tuners, registration, and the two `inject_` functions."""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..memory import MemoryGroup
from ..models import architectures
from ..runtime.context import EditRuntime, runtime_of
from .adapters import lifted_layers, put_beside, unwrap_layers
from .config import BalancEditConfig, DualEditConfig, EditConfig, EditType
from .layer import BalancEditLayer, DualEditLayer, EditLayer, Role


def _ensure_runtime(model: nn.Module, image_ids: list[int]) -> EditRuntime:
    runtime = runtime_of(model)
    if runtime is None:
        runtime = EditRuntime(image_ids)
        path, _ = architectures.find_decoder_layers(model)
        runtime.install(model, model.get_submodule(path.rpartition(".")[0]))
        model._dualedit_runtime = runtime
    runtime.image_ids = sorted({*runtime.image_ids, *image_ids})
    return runtime


class EditTuner(BaseTuner):
    """What both tuners share: placing wrapped layers, checkpoint keys, and leaving without a trace."""

    containers: tuple[str, ...] = ()
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: EditConfig, model_config: dict) -> EditConfig:
        model = self.model
        architectures.check_fingerprint(model, peft_config.base_fingerprint)
        targets = self._targets(peft_config)
        if peft_config.image_token_ids is None:
            peft_config.image_token_ids = architectures.image_token_ids(model)
        peft_config.base_fingerprint = peft_config.base_fingerprint or architectures.fingerprint(model)
        peft_config.target_modules = targets
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Place the adapter's layers, in whatever order editors come on a model.

        The other editor's layers are lifted meanwhile: PEFT passes over modules inside wrapped ones.
        """
        with lifted_layers(model, but=self.tuner_layer_cls):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    @abstractmethod
    def _targets(self, config: EditConfig) -> list[str]:
        """Full names of the modules that the config asks for."""

    def _group(self, runtime: EditRuntime, adapter_name: str) -> MemoryGroup:
        return runtime.groups.setdefault((self.prefix, adapter_name), MemoryGroup())

    def _make_room(self, config: EditConfig, group: MemoryGroup, layer_name: str) -> None:
        sizes = (config.memory_sizes or {}).get(layer_name)
        if sizes is not None:
            group.memories[layer_name].reserve(**sizes)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # A wrapper has placed its own parts already; on unload the base layer stands where it stood.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Edits cannot be merged into the base weights: they apply only to the inputs that they match. "
            "Keep the adapter, or call unload() to drop the edits."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        # PEFT does not look for wrapped layers inside wrapped layers, where other adapters may be.
        unwrap_layers(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # The config is written after the tensors: it tells loaders that allocate first how much to allocate.
        runtime = runtime_of(architectures.unwrap(model))
        group = None if runtime is None else runtime.groups.get((cls.prefix, adapter_name))
        if group is not None:
            config.memory_sizes = {name: memory.sizes() for name, memory in group.memories.items()}
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # Tensors mapped from a file can be unaligned, and an unaligned operand changes the last bit of a
        # product.
        aligned = {key: value.clone() for key, value in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, aligned)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own rule looks at the end of a key; here the name stands in the middle of it. A layer inside
        # a wrapped one is called as if it were not, so that a file fits whatever else is on the model.
        for container in cls.containers:
            marker = f".{container}.{adapter_name}."
            if marker in key:
                return architectures.plain_name(key.replace(marker, f".{container}."))
        return super()._remove_adapter_name_from_key(key, adapter_name)


class DualEditModel(EditTuner):
    """Wraps the decoder layers that DualEdit's adapters write to."""

    prefix = "dualedit_"
    tuner_layer_cls = DualEditLayer
    containers = ("dualedit_adapter", "dualedit_router", "dualedit_memory")

    def _targets(self, config: DualEditConfig) -> list[str]:
        model = self.model
        names = []
        for argument in ("vis_layer", "text_layer"):
            layer = getattr(config, argument)
            if layer is not None:
                names.append(architectures.resolve_layer(model, layer, argument))
                architectures.check_image_positions(model, config.image_token_ids, layer, argument)
        return sorted(set(names))

    def _create_and_replace(
        self,
        peft_config: DualEditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        runtime = _ensure_runtime(self.model, peft_config.image_token_ids)
        role = self._role(peft_config, current_key)
        layer = target
        if not isinstance(target, DualEditLayer):
            layer = DualEditLayer(target, architectures.plain_name(current_key), runtime)
        width, group = architectures.hidden_size(self.model), self._group(runtime, adapter_name)
        layer.update_layer(adapter_name, peft_config, role, width, group)
        self._make_room(peft_config, group, layer.layer_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _role(self, config: DualEditConfig, key: str) -> Role:
        text, vision = (
            None if layer is None else architectures.resolve_layer(self.model, layer, argument)
            for argument, layer in (("text_layer", config.text_layer), ("vis_layer", config.vis_layer))
        )
        # The decision must exist before either adapter writes: it is made at the earlier layer, which in the
        # paper's setting (16 and 19) is the text layer.
        number = {name: int(name.rpartition(".")[2]) for name in (text, vision) if name is not None}
        return Role(text=key == text, vision=key == vision, gate=key == min(number, key=number.get))


class BalancEditModel(EditTuner):
    """Wraps the linear layer that holds BalancEdit's codebook."""

    prefix = "balancedit_"
    tuner_layer_cls = BalancEditLayer
    containers = ("balancedit_adapter", "balancedit_memory")

    def _targets(self, config: BalancEditConfig) -> list[str]:
        return [architectures.resolve_linear(self.model, config.layer, "layer")]

    def _create_and_replace(
        self,
        peft_config: BalancEditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        runtime = _ensure_runtime(self.model, peft_config.image_token_ids)
        layer = target
        if not isinstance(target, BalancEditLayer):
            layer = BalancEditLayer(target, architectures.plain_name(current_key), runtime)
        group = self._group(runtime, adapter_name)
        width = architectures.hidden_size(self.model) if peft_config.key == "pooled" else None
        layer.update_layer(adapter_name, peft_config, group, width)
        self._make_room(peft_config, group, layer.layer_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        runtime.watch(*architectures.layer_around(self.model, layer.layer_name))


def _register() -> None:
    """Enter both methods in PEFT's tables (its own registration refuses names that it does not list)."""
    for kind, config, tuner in (
        (EditType.DUALEDIT, DualEditConfig, DualEditModel),
        (EditType.BALANCEDIT, BalancEditConfig, BalancEditModel),
    ):
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix


_register()


def _inject(model: nn.Module, config: EditConfig, adapter_name: str) -> PeftModel:
    if isinstance(model, PeftMixedModel):
        raise ValueError(
            "model is a PeftMixedModel: edits cannot be mixed into it, PEFT lets it hold only methods that "
            "it knows. Pass the base model, or a PeftModel: edits stand beside its adapters."
        )
    if isinstance(model, PeftModel):
        put_beside(model, config, adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


# How edits are made from now on; what is saved does not depend on it.
_OF_NEW_EDITS = ("refine_steps", "refine_rate", "refine_probability")


def _inject_trained(
    model: nn.Module, folder: str | os.PathLike[str], given: dict[str, Any], adapter_name: str
) -> PeftModel:
    """Saved DualEdit adapters on a base model, with the threshold that is asked for."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__} already: pass the base model, or add the saved adapters with "
            f"model.load_adapter(folder, adapter_name)."
        )
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter={os.fspath(folder)!r} holds no adapter_config.json: pass a folder of adapters."
        )
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, DualEditConfig):
        raise ValueError(f"adapter={os.fspath(folder)!r} holds a {config.peft_type} adapter, not DualEdit's.")
    defaults = inspect.signature(inject_dualedit).parameters
    for name, value in given.items():
        kept = getattr(config, name)
        free = name == "threshold" or name in _OF_NEW_EDITS
        if not free and value != defaults[name].default and value != kept:
            raise ValueError(
                f"{name}={value!r}: the adapters in {os.fspath(folder)!r} have {kept!r}. Leave {name} out."
            )
    chosen = {name: given[name] for name in (*_OF_NEW_EDITS, "threshold") if given[name] is not None}
    checked = replace(config, **chosen)  # and resolved
    for name in chosen:
        setattr(config, name, getattr(checked, name))
    return PeftModel.from_pretrained(model, os.fspath(folder), adapter_name=adapter_name, config=config)


def inject_dualedit(
    model: nn.Module,
    text_layer: int | str | None = 16,
    vis_layer: int | str | None = 19,
    mid_dim: int = 1024,
    num_heads: int = 8,
    threshold: float | str | None = None,
    gate: str = "prompt",
    key: str = "last",
    key_dim: int = 128,
    radius: str = "threshold",
    alpha: float = 0.5,
    refine_steps: int | None = None,
    refine_rate: float | None = None,
    refine_probability: float | None = None,
    norm_eps: float = 1e-5,
    init_weights: bool = True,
    image_token_ids: list[int] | None = None,
    adapter_name: str = "default",
    adapter: str | os.PathLike[str] | None = None,
) -> PeftModel:
    """Put DualEdit's adapters into a vision-language model.

    Args:
        model: a Hugging Face decoder-only VLM; or a `PeftModel` of one, LoRA or another editor, beside whose
            adapters this one is put.
        threshold: tau; "calibrated" takes the one that calibration found for trained adapters and saved with
            them (`calibrated_threshold` in their config); None takes 0.8, and the saved one with `adapter`.
        refine_steps, refine_rate, refine_probability: as in `DualEditConfig`; None takes its defaults, and
            the saved ones with `adapter`.
        adapter_name: PEFT's name of the adapter.
        adapter: folder of trained adapters, as `save_pretrained` or `save_edits` wrote it, instead of new
            ones; layers and widths are theirs and need not be passed. The same as
            `PeftModel.from_pretrained(model, adapter)`, edits included, but for the threshold and how new
            edits are refined.
        others: as in `DualEditConfig`, whose defaults they share.

    Returns:
        a `PeftModel` around the same model (or the one that was passed); without stored edits it answers bit
        for bit as before. Beside adapters of its own method it is not active until
        `model.set_adapter(adapter_name)`, as PEFT has it; beside adapters of other methods it is.

    Raises:
        ValueError: a layer that does not exist, a `vis_layer` on a model without image positions, a bad
            setting, "calibrated" for adapters that nobody has calibrated, a setting that the saved adapters
            do not have. The model is left as it was.

    Source: DualEdit (COLM 2025, arXiv:2506.13638).
    """
    given = dict(
        text_layer=text_layer, vis_layer=vis_layer, mid_dim=mid_dim, num_heads=num_heads, threshold=threshold,
        gate=gate, key=key, key_dim=key_dim, radius=radius, alpha=alpha, refine_steps=refine_steps,
        refine_rate=refine_rate, refine_probability=refine_probability, norm_eps=norm_eps,
        init_weights=init_weights, image_token_ids=image_token_ids,
    )  # fmt: skip
    if adapter is not None:
        return _inject_trained(model, adapter, given, adapter_name)
    for name in (*_OF_NEW_EDITS, "threshold"):
        if given[name] is None:
            del given[name]
    return _inject(model, DualEditConfig(**given), adapter_name)


def inject_balancedit(
    model: nn.Module,
    layer: str,
    alpha: float = 0.2,
    metric: str = "l2",
    key: str = "mean",
    key_dim: int = 128,
    value: str = "low_rank",
    rank: int = 8,
    learning_rate: float = 3e-3,
    max_steps: int = 50,
    stop_probability: float = 0.9,
    image_token_ids: list[int] | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Put BalancEdit's codebook at one linear layer of a vision-language model.

    Args:
        model: a Hugging Face decoder-only VLM.
        layer: name or unambiguous suffix of a linear layer inside the decoder, such as
            "layers.20.mlp.up_proj".
        adapter_name: PEFT's name of the adapter.
        others: as in `BalancEditConfig`, whose defaults they share.

    Returns:
        a `PeftModel` around the same model (or the one that was passed); without stored edits it answers bit
        for bit as before. Beside adapters of its own method it is not active until
        `model.set_adapter(adapter_name)`, as PEFT has it; beside adapters of other methods it is.

    Raises:
        ValueError: no such layer, or a bad setting. The model is left as it was.

    Source: BalancEdit (ICML 2025, arXiv:2505.01343).
    """
    config = BalancEditConfig(
        layer=layer, alpha=alpha, metric=metric, key=key, key_dim=key_dim, value=value, rank=rank,
        learning_rate=learning_rate, max_steps=max_steps, stop_probability=stop_probability,
        image_token_ids=image_token_ids,
    )  # fmt: skip
    return _inject(model, config, adapter_name)


def group_of(base: nn.Module, adapter_name: str) -> MemoryGroup:
    """The memories of one edit adapter on a base model. Raises KeyError for an unknown name."""
    config = base.peft_config[adapter_name]
    tuner = DualEditModel if isinstance(config, DualEditConfig) else BalancEditModel
    return runtime_of(base).groups[(tuner.prefix, adapter_name)]


def active_group(model: nn.Module) -> tuple[str, Any, MemoryGroup]:
    """The adapter that edits go to: its name, config, and memories.

    Raises:
        ValueError: the model has no edit adapter, or several are active.
    """
    base = architectures.unwrap(model)
    runtime = runtime_of(base)
    configs = getattr(base, "peft_config", {})
    layers = [module for module in base.modules() if isinstance(module, EditLayer)]
    off = frozenset() if runtime is None else runtime.switched_off()
    active = {n for layer in layers for n in layer.active_adapters if n in layer.configs}
    names = sorted(active - off)
    if runtime is None or not names:
        raise ValueError(
            f"{type(base).__name__} has no active edit adapter: call inject_dualedit(model, ...) or "
            f"inject_balancedit(model, ...) first."
        )
    if len(names) > 1:
        raise ValueError(
            f"Several edit adapters are active ({', '.join(names)}): choose one with "
            f"model.set_adapter(name), or switch the others off meanwhile: "
            f"with dualedit.disabled(model, {names[-1]!r}): ..."
        )
    return names[0], configs[names[0]], group_of(base, names[0])
