"""The repository's recipes, which the package can run but does not contain."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_REPOSITORY = Path(__file__).resolve().parents[3]


def recipe(name: str) -> ModuleType:
    """A module of `recipes.toy`, such as "train_editors".

    Raises:
        ImportError: the package was installed without the repository.
    """
    if (_REPOSITORY / "recipes" / "toy").is_dir() and str(_REPOSITORY) not in sys.path:
        sys.path.append(str(_REPOSITORY))
    try:
        return importlib.import_module(f"recipes.toy.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("recipes"):
            raise
        raise ImportError(
            f"recipes.toy.{name}, by which the embedded model was trained, lies in the repository and not in "
            "the package: run this with an editable install of the repository (make setup)."
        ) from error
