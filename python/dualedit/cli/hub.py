"""Models by their name on the model hub, wherever a model's folder goes: ORG/NAME or ORG/NAME@REVISION."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import first_line
from .terminal import offline_by_wish

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "original/*"]


def local_folder(model: Path, option: str = "--model") -> Path:
    """The folder of a model: its own, or what the hub has under its name, fetched once into the hub's cache.

    Args:
        model: a folder, or ORG/NAME with a branch, tag or commit behind an @; a folder of that name goes
            first.
        option: by which it was passed, for errors.

    Raises:
        ValueError: it looks like a name on the hub, and can be neither found in the cache nor fetched.
    """
    named = _NAME.fullmatch(model.as_posix())
    if model.exists() or named is None:
        return model
    from huggingface_hub import snapshot_download

    name, revision = named["name"], named["revision"]
    try:
        with _as_the_user_wishes():
            return Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_NEEDED))
    except Exception as error:  # the hub's, the network's, the disk's: each is the user's to mend
        reason = first_line(error).rstrip(".:")
        raise ValueError(
            f"{option} {model} is no folder, and the model hub's {name} cannot be fetched ({reason}): pass a "
            "local folder, or try again with a network."
        ) from error


@contextmanager
def _as_the_user_wishes() -> Iterator[None]:
    """Commands keep libraries off the network (`terminal.quiet`); a model that is named may be fetched."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline_by_wish()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
