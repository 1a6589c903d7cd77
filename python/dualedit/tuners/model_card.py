"""The README.md of a saved folder: what it holds and how to load it, as a model card of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_BEGIN, _END = "<!-- dualedit: begin -->", "<!-- dualedit: end -->"
_METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def _base_lines(base: str | None, base_class: str | None, fingerprint: Mapping[str, object]) -> list[str]:
    kind = base_class or "AutoModelForImageTextToText"
    if base:
        return [f"base = {kind}.from_pretrained({base!r})"]
    known = ", ".join(f"{name} {value}" for name, value in fingerprint.items() if value is not None)
    return [f"base = ...  # the {kind} that the edits were made on, in eval mode ({known})"]


def how_to_load(
    title: str,
    paper: str,
    base: str | None,
    base_class: str | None = None,
    fingerprint: Mapping[str, object] | None = None,
    edits: int = 0,
) -> str:
    """The section of a model card that describes a saved adapter and loads it.

    Args:
        title, paper: name of the method, address of its paper.
        base: name or folder of the base model; None or empty when it has none.
        base_class: its class in transformers; None takes the auto class.
        fingerprint: what is known of a base model without a name.
        edits: how many edits are stored.
    """
    imports = f"from transformers import {base_class or 'AutoModelForImageTextToText'}"
    code = [
        "import dualedit  # registers its adapters with PEFT",
        "from peft import PeftModel",
        *([imports] if base else []),
        "",
        *_base_lines(base, base_class, fingerprint or {}),
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or the name of its repository',
        "model.eval()",
    ]
    return "\n".join(
        [
            _BEGIN,
            f"# {title} adapter with {edits} stored edit{'' if edits == 1 else 's'}",
            "",
            f"Corrections of a vision-language model by [{title}]({paper}), stored beside its weights. "
            "Questions that no edit concerns are answered by the base model, bit for bit.",
            "",
            "DualEdit Kernels is on no package index. In a checkout of it run",
            "",
            "```sh",
            "pip install .    # or, where there is a wheel of it: pip install dualedit_kernels-*.whl",
            "```",
            "",
            "```python",
            *code,
            "```",
            "",
            "`dualedit.list_edits(model)` lists what is corrected, `dualedit.Editor(model, processor)` "
            "corrects more, `model.disable_adapter()` asks the base model.",
            _END,
        ]
    )


def write_card(folder: str | os.PathLike[str], section: str, base: str | None) -> None:
    """Put the section into the README.md of a folder: a card's metadata and what others wrote stay.

    The template that PEFT fills in for every adapter, empty headings that say nothing, gives way.
    """
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = _METADATA.match(text)
    metadata, body = (found.group(), text[found.end() :]) if found else ("", text)
    if not metadata:
        tags = [f"base_model: {base}"] if base else []
        metadata = "\n".join(["---", *tags, "library_name: peft", "---", ""])
    if _BEGIN in body and _END in body:
        before, rest = body.split(_BEGIN, 1)
        body = before + section + rest.split(_END, 1)[1]
    elif "[More Information Needed]" in body or not body.strip():
        versions = re.search(r"^### Framework versions.*", body, re.DOTALL | re.MULTILINE)
        body = "\n" + section + "\n" + (f"\n{versions.group()}" if versions else "")
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    file.write_text(metadata + body, encoding="utf-8")


def with_count(card: str, edits: int) -> str:
    """A model card that says another number of stored edits."""
    plural = "" if edits == 1 else "s"
    return re.sub(r"( adapter with )\d+( stored edit)s?", rf"\g<1>{edits}\g<2>{plural}", card)
