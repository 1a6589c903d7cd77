"""Edited models with what transformers answers, for engines to be compared with."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_hub_models
import torch
from dualedit import Editor, inject_balancedit, inject_dualedit, load_edits, save_edits
from dualedit.memory.routing import nearest_edit
from dualedit.runtime.recording import record_states
from dualedit.store import Store, publish
from dualedit.toy.editors import EDITORS
from dualedit.toy.model import WEIGHTS, load_embedded
from dualedit.toy.pictures import sample_pictures
from dualedit.tuners.adapter import active_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

TOKENS = 6  # of an answer


@dataclass
class Ask:
    """A question and what transformers answers to it.

    Attributes:
        image, question: as asked; text: the prompt as the model reads it.
        base, edited: tokens of the answer without and with the edits.
        logs: log probabilities [V] of the first token, with the edits.
        edit: number of the edit that answers; None: none.
        key: the routing key.
    """

    image: Any
    question: str
    text: str
    base: list[int]
    base_logs: torch.Tensor
    edited: list[int]
    logs: torch.Tensor
    edit: int | None
    key: torch.Tensor


@dataclass
class World:
    """A base model, a folder of edits, the store that it was published to, and questions.

    Attributes:
        model: folder of the base model; stock: the same as vLLM's own class reads it.
    """

    name: str
    model: Path
    stock: Path
    folder: Path
    store: Path
    editor: Editor
    asks: list[Ask]

    @property
    def fired(self) -> list[Ask]:
        """The questions that an edit answers."""
        return [ask for ask in self.asks if ask.edit is not None]

    @property
    def unedited(self) -> list[Ask]:
        """The others."""
        return [ask for ask in self.asks if ask.edit is None]

    def named(self, ask: Ask) -> str | None:
        """An ask's edit as requests carry it."""
        moment = Store(self.store).now()
        return None if ask.edit is None else f"{moment.file_of(ask.edit).name}@{moment.version}"


def answer(editor: Editor, image: Any, question: str) -> tuple[list[int], torch.Tensor]:
    """Tokens of transformers' answer, and the log probabilities of the first one."""
    inputs = editor.prompter.inputs([(image, question)])
    with torch.no_grad():
        out = editor.model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.log_softmax(out.logits[0][0].float(), -1)


def asked(editor: Editor, base: list, questions: list) -> list[Ask]:
    """Questions with the answers, routes and keys of transformers."""
    adapter, asks = active_adapter(editor.model), []
    for (image, question), (tokens, logs) in zip(questions, base, strict=True):
        inputs = editor.prompter.inputs([(image, question)])
        key = adapter.key_of(*record_states(adapter.base, inputs))[0].float()
        stored = adapter.stored()
        row, _ = nearest_edit(key[None], stored, adapter.metric, adapter.radii(stored))
        edited, with_edits = answer(editor, image, question)
        number = stored.id_of(int(row)) if int(row) >= 0 else None
        text = editor.prompter.text(image, question)
        asks.append(Ask(image, question, text, tokens, logs, edited, with_edits, number, key))
    return asks


def finished(name: str, model: Path, editor: Editor, place: Path, edits: list, questions: list) -> World:
    """Tell a model edits, ask it before and after, save and publish them."""
    base = [answer(editor, *question) for question in questions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for image, question, target in edits:
            editor.edit(image, question, target, keep_failed=True)
    asks = asked(editor, base, questions)
    save_edits(editor.model, place / "edits")
    publish(place / "edits", place / "store")
    stock = as_stock_reads(model, place / "stock")
    return World(name, model, stock, place / "edits", place / "store", editor, asks)


def as_stock_reads(model: Path, place: Path) -> Path:
    """A model's folder with the names of CLIP's weights that vLLM's own LLaVA knows."""
    from dualedit.serving.vllm.names import clip_name

    shutil.copytree(model, place)
    weights = load_file(model / "model.safetensors")
    named = {clip_name(name): weight for name, weight in weights.items()}
    save_file(named, place / "model.safetensors", {"format": "pt"})
    return place


def toy_world(method: str, place: Path) -> World:
    """The embedded model with its shipped editor, edits of two pictures, questions about six."""
    model, processor = load_embedded()
    editor = Editor(load_edits(model, EDITORS / method), processor)
    pictures = sample_pictures()
    questions = [(p.image, question) for p in pictures[:6] for question, _ in p.questions]
    first, other = pictures[0], pictures[3]
    told = [other_answer for _, other_answer in other.questions]
    edits = [
        (first.image, question, target)
        for (question, _), target in list(zip(first.questions, told, strict=False))[:3]
    ]
    return finished(f"toy-{method}", WEIGHTS, editor, place, edits, questions)


def tiny_world(family: str, method: str, place: Path) -> World:
    """A random LLaVA-1.5 ("llava") or Qwen2.5-VL ("qwen") with two edits.

    BalancEdit has full values at another kind of linear layer than the embedded model's low-rank ones.
    """
    make = {"llava": tiny_hub_models.make_llava, "qwen": tiny_hub_models.make_qwen}[family]
    folder = make(place / "model", 3, tiny_hub_models.Size(width=64, heads=2, layers=4))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if method == "dualedit":
        torch.manual_seed(5)
        model = inject_dualedit(
            model, text_layer=1, vis_layer=2, mid_dim=32, num_heads=2, threshold=0.9999, init_weights=False
        )
        with torch.no_grad():  # random adapters that write loudly
            for weight in (p for n, p in model.named_parameters() if "o_proj" in n and "dualedit" in n):
                weight.normal_(std=0.5)
    else:
        model = inject_balancedit(
            model, layer="layers.2.mlp.down_proj", value="full", alpha=0.5, max_steps=20, learning_rate=0.01
        )
    editor = Editor(model, processor)
    pictures = [picture.image for picture in sample_pictures()[:3]]
    wordings = ("What brand is this computer?", "the quick brown fox jumps over a lazy dog?", "Which brand?")
    questions = [(picture, question) for picture in pictures for question in wordings]
    edits = [(*questions[0], "lenovo"), (*questions[4], "acer dell")]
    return finished(f"{family}-{method}", folder, editor, place, edits, questions)
