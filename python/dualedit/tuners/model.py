"""What the tuners of all editing methods share: placing wrapped layers, checkpoint keys, and injection."""

from __future__ import annotations

import dataclasses
import inspect
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..memory import MemoryGroup
from ..memory.rows import without_edits
from ..models import architectures
from ..runtime.context import EditRuntime, runtime_of
from .adapters import lifted_layers, put_beside, unwrap_layers
from .config import EditConfig
from .journaled import with_journal
from .layer import CANNOT_MERGE, EditLayer


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
    """Wraps layers of a model for the adapters of one editing method, and leaves without a trace.

    A method's tuner says which modules it wraps (`_targets`) and gives a wrapped layer its adapter
    (`_update`).

    Attributes:
        prefix: of the names of everything that its layers hold, as PEFT wants it: the method's name and "_".
        tuner_layer_cls: its `EditLayer`.
        containers: the layer's ModuleDicts, whose entries are adapters.
    """

    containers: tuple[str, ...] = ()
    target_module_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def _targets(self, config: EditConfig) -> list[str]:
        """Full names of the modules that the config asks for."""

    @abstractmethod
    def _update(
        self, layer: EditLayer, adapter_name: str, config: EditConfig, group: MemoryGroup, key: str
    ) -> None:
        """Add an adapter to a wrapped layer. `key`: the layer's full name as PEFT has it."""

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

        Other methods' layers are lifted meanwhile: PEFT passes over modules inside wrapped ones.
        """
        with lifted_layers(model, but=self.tuner_layer_cls):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: EditConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        runtime = _ensure_runtime(self.model, peft_config.image_token_ids)
        group = runtime.groups.setdefault((self.prefix, adapter_name), MemoryGroup())
        layer = target
        if not isinstance(target, self.tuner_layer_cls):
            layer = self.tuner_layer_cls(target, architectures.plain_name(current_key), runtime)
        self._update(layer, adapter_name, peft_config, group, current_key)
        sizes = (peft_config.memory_sizes or {}).get(layer.layer_name, {})
        group.memories[layer.layer_name].expect(sizes.get("edits", 0))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # A wrapper has placed its own parts already; on unload the base layer stands where it stood.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        # PEFT does not look for wrapped layers inside wrapped layers, where other adapters may be.
        unwrap_layers(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # The config is written after the tensors, and says how many edits the folder holds.
        runtime = runtime_of(architectures.unwrap(model))
        group = None if runtime is None else runtime.groups.get((cls.prefix, adapter_name))
        if group is not None:
            config.memory_sizes = group.sizes()
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # Tensors mapped from a file can be unaligned, and an unaligned operand changes the last bit of a
        # product.
        if config.budget is not None:
            state_dict = without_edits(state_dict)  # `saved.fill_adapter` reads them
        elif config.saved_in is not None:
            state_dict = with_journal(*config.saved_in, state_dict)
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


# ---------------------------------------------------------------------- injection


def inject(model: nn.Module, config: EditConfig, adapter_name: str = "default") -> PeftModel:
    """Put an edit adapter on a model: on a base model, or beside the adapters of a `PeftModel`.

    Raises:
        ValueError: what the config asks for is not there, or the model takes no edits. It is left as it was.
    """
    if isinstance(model, PeftMixedModel):
        raise ValueError(
            "model is a PeftMixedModel: edits cannot be mixed into it, PEFT lets it hold only methods that "
            "it knows. Pass the base model, or a PeftModel: edits stand beside its adapters."
        )
    if isinstance(model, PeftModel):
        put_beside(model, config, adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def config_from(
    config_class: type[EditConfig], config: EditConfig | None, fields: dict[str, Any], function: str
) -> EditConfig:
    """The config that a call of an `inject_` function asks for: one that is given, or one of its fields.

    Raises:
        TypeError: a field that the config does not have, or a config of another method.
        ValueError: both are given.
    """
    if config is not None and not isinstance(config, config_class):
        known = settings_of(config_class)
        raise TypeError(
            f"{function}(model, {config!r}): the second argument is a {config_class.__name__}. Pass its "
            f"fields by name: {function}(model, {next(iter(known))}=...)."
        )
    if config is not None and fields:
        raise ValueError(f"config and {sorted(fields)} are both given: put the fields into the config.")
    unknown = sorted(set(fields) - set(settings_of(config_class)))
    if unknown:
        known = ", ".join(settings_of(config_class))
        raise TypeError(f"{function}() has no setting {unknown[0]!r}. There are: {known}.")
    return config if config is not None else config_class(**fields)


def settings_of(config_class: type[EditConfig]) -> dict[str, dataclasses.Field]:
    """The fields of a config that a user sets, by name; a method's own first."""
    shared = {entry.name for entry in dataclasses.fields(EditConfig)}
    entries = {entry.name: entry for entry in dataclasses.fields(config_class) if entry.init}
    own = {name: entry for name, entry in entries.items() if name not in shared}
    return own | {"image_token_ids": entries["image_token_ids"]}


def shows_settings(config_class: type[EditConfig]) -> Callable[[Callable], Callable]:
    """Let `help()` and editors show a config's fields as arguments of the function that takes them."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=entry.default, annotation=entry.type
            )
            for name, entry in settings_of(config_class).items()
        ]
        function.__signature__ = signature.replace(parameters=[*named, *fields])
        return function

    return decorate


def saved_config(folder: str | os.PathLike[str], config_class: type[EditConfig]) -> EditConfig:
    """The config of a folder of saved adapters.

    Raises:
        ValueError: no adapter there, or one of another method.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter={os.fspath(folder)!r} holds no adapter_config.json: pass a folder of adapters."
        )
    config = PeftConfig.from_pretrained(os.fspath(folder))
    if not isinstance(config, config_class):
        wanted = config_class.method.title
        raise ValueError(f"adapter={os.fspath(folder)!r} holds a {config.peft_type} adapter, not {wanted}'s.")
    return config
