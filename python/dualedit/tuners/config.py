"""What the configurations of all editing methods share: PEFT configs, dataclasses saved with the adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from peft.config import PeftConfig
from safetensors import SafetensorError, safe_open

from ..folder import View, find_folder, read_folder
from ..folder.manifest import CONFIG, WEIGHTS
from ..folder.sealing import seal
from ..memory import Budget
from .model_card import how_to_load, write_card

if TYPE_CHECKING:
    from .method import EditMethod


class EditType(str):
    """The name of an editing method as PEFT knows it: a string to JSON, with the `.value` that PEFT and
    transformers ask of a PEFT type."""

    @property
    def value(self) -> str:
        return str(self)


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    """Raise ValueError naming the argument, its value and the remedy, unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}.")


def require_numbers(config: object, *names: str) -> None:
    """Raise ValueError for settings that are no numbers, such as texts of numbers."""
    for name in names:
        value = getattr(config, name)
        require(
            isinstance(value, (int, float)) and not isinstance(value, bool), name, value, "pass a number"
        )


def check_adapter_file(folder: str | os.PathLike[str]) -> None:
    """Refuse a saved folder whose weights cannot be read in full, before any model is touched.

    A folder without weights is left to PEFT, which has its own message for it.

    Raises:
        ValueError: the safetensors file is cut short or damaged.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return
    try:
        with safe_open(str(file), framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or damaged ({error}); nothing was loaded. Restore the file from a copy "
            f"or save the edits again."
        ) from error


def _are_sizes(sizes: object) -> bool:
    return isinstance(sizes, dict) and all(type(size) is int and size >= 0 for size in sizes.values())


@dataclass
class EditConfig(PeftConfig):
    """What the settings of all editing methods share.

    Attributes:
        method: the `EditMethod` that these are settings of; set by `register_edit_method`.
        target_modules: full names of the wrapped modules; found at injection, never set by hand.
        image_token_ids: ids that stand for image (or video) content in `input_ids`; None reads them from the
            model's config, [] leaves it to `explicit_masks` to say where images are.
        base_fingerprint: what the base model looked like when the edits were made; injection into a model
            that looks different is refused. None skips the check.
        memory_sizes: rows of each layer's tables in the saved file, written by saving: a loader that leaves
            the edits behind is found out by it.
        fallback: name of the adapter beside this one that holds the edits which this one could not write; it
            is saved and loaded with it. Set by `Editor`.
    """

    method: ClassVar[EditMethod]
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Full names of the wrapped modules; found at injection."}
    )
    image_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids of image content in input_ids; None reads the model's config."}
    )
    base_fingerprint: dict[str, object] | None = field(
        default=None, metadata={"help": "What the base model looked like when the edits were made."}
    )
    memory_sizes: dict[str, dict[str, int]] | None = field(
        default=None, metadata={"help": "Rows of each layer's tables in the saved file; set by saving."}
    )
    fallback: str | None = field(
        default=None, metadata={"help": "Adapter with what this one could not write; set by Editor."}
    )

    def __post_init__(self):
        super().__post_init__()
        # The folder that the settings were read from, where it has a manifest, and the adapter's name in it.
        # No field: it is not saved.
        self.saved_in: tuple[View, str] | None = None
        # How much memory the values of edits that are loaded may take; None: all of them. No field, either.
        self.budget: Budget | None = None
        sizes = self.memory_sizes
        fits = sizes is None or (isinstance(sizes, dict) and all(_are_sizes(each) for each in sizes.values()))
        require(fits, "memory_sizes", sizes, "it is set by saving; restore the file from a copy")
        ids = self.image_token_ids
        fits = ids is None or (isinstance(ids, list) and all(type(each) is int for each in ids))
        require(fits, "image_token_ids", ids, "pass a list of token ids")
        named = self.fallback is None or (isinstance(self.fallback, str) and self.fallback != "")
        require(named, "fallback", self.fallback, "it is the name of an adapter, set by Editor")

    def save_pretrained(self, save_directory, **kwargs):
        """Write the config, and into the README.md beside it how to load the adapter."""
        mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        super().save_pretrained(save_directory, **kwargs)
        section = how_to_load(
            self.method.title,
            self.method.paper,
            self.base_model_name_or_path,
            mapping.get("base_model_class"),
            self.base_fingerprint,
            max((sizes["edits"] for sizes in (self.memory_sizes or {}).values()), default=0),
        )
        write_card(save_directory, section, self.base_model_name_or_path)
        seal(Path(save_directory))  # of what stood there before, journal and manifest speak no longer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Read the config of a saved folder, after checking that the weights beside it are whole."""
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not folder.is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        found = find_folder(folder)
        view = None if found is None else read_folder(found[0], records=False)
        check_adapter_file(folder if found is None else view.own_file(found[1], WEIGHTS).parent)
        if found is None or view.own_file(found[1], CONFIG).parent == folder:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        else:  # a save was stopped before its files were in their places
            config = super().from_pretrained(str(view.own_file(found[1], CONFIG).parent), **kwargs)
        if found is not None:
            config.saved_in = (view, found[1])
        return config
