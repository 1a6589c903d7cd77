"""A tiny vision-language model with edits made of chance: what is measured here is what becomes of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from dualedit import inject_balancedit, inject_dualedit
from dualedit.memory import MemoryGroup
from dualedit.tuners.adapter import adapter_of
from peft import PeftModel
from torch import Tensor, nn

LAYER = "layers.1.mlp.up_proj"
IMAGE = 60
SECOND = "more"  # name of the second adapter

State = dict[tuple[str, int], tuple[str, str, str]]


def base_model() -> nn.Module:
    """A LLaVA of two narrow layers, always the same."""
    torch.manual_seed(0)
    text = hf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
        patch_size=4, projection_dim=8,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4
    )
    return hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def edited_model(adapters: int = 1, method: str = "balancedit") -> PeftModel:
    """The model with one adapter, or with DualEdit and its fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapters == 2 or method == "dualedit":
            model = inject_dualedit(
                base_model(),
                text_layer=0,
                vis_layer=1,
                mid_dim=8,
                num_heads=2,
                init_weights=False,
                threshold=0.9,
            )
        else:
            model = inject_balancedit(base_model(), layer=LAYER, rank=2)
        if adapters == 2:
            inject_balancedit(model, layer=LAYER, rank=2, adapter_name=SECOND)
            model.peft_config["default"].fallback = SECOND
    return model


def group_of(model: PeftModel, name: str = "default") -> MemoryGroup:
    """The stored edits of an adapter."""
    return adapter_of(model.get_base_model(), name).group


def rows_for(group: MemoryGroup, seed: int) -> dict[str, dict[str, Tensor]]:
    """An edit made of chance, as `MemoryGroup.add` takes it."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, dict[str, Tensor]] = {}
    for layer, memory in group.memories.items():
        rows[layer] = {n: torch.randn(shape, generator=generator) for n, shape in memory.edit_tables.items()}
        if "radius" in rows[layer]:
            rows[layer]["radius"] = torch.rand((), generator=generator)
        tokens = 2 + seed % 3
        rows[layer] |= {
            n: torch.randn((tokens, *shape), generator=generator) for n, shape in memory.token_tables.items()
        }
    return rows


def state_of(model: PeftModel) -> State:
    """Each edit's id, note and digest of its rows."""
    found: State = {}
    for name in model.peft_config:
        group = group_of(model, name)
        snapshots, records = group.listed()
        for number, record in records.items():
            digest = hashlib.sha256()
            for layer, tables in sorted(group.rows(snapshots, number).items()):
                for table, row in sorted(tables.items()):
                    digest.update(f"{layer}.{table}".encode() + row.contiguous().numpy().tobytes())
            found[name, number] = (record.get("uid", ""), record.get("note", ""), digest.hexdigest()[:16])
    return found


def leftovers(folder: Path, adapters: Sequence[str]) -> list[str]:
    """Files of a folder that neither its manifest nor its journal speaks of."""
    from dualedit.folder import read_folder
    from dualedit.folder.manifest import MANIFEST, segment_name

    view = read_folder(folder)
    if view.manifest is None:
        return [f"{folder} has no manifest"]
    known = {MANIFEST, view.manifest.journal, ".lock", ".lock.holder", *view.manifest.files}
    known |= {str(Path(place, "README.md")) for place in view.adapters.values()}
    known |= {segment_name(seq) for seq in view.segments()}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(files - known)
