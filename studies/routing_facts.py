"""What the routing study looks at: questions about facts, each with the keys that the model gives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dualedit.data import EditSample
from dualedit.editor import Editor
from dualedit.runtime.context import recording, runtime_of
from dualedit.toy.world import ATTRIBUTES, QUESTIONS
from dualedit.tuners import active_adapter
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from tqdm.auto import tqdm

KINDS = ("rel", "t_gen", "v_gen", "t_loc", "m_loc", "hard_image", "hard_question")
RELATED = ("rel", "t_gen", "v_gen")


@dataclass
class Facts:
    """Q questions about F facts, and what automatic samples say about each fact's surroundings.

    Attributes:
        keys: key name to [Q, P] float16 of the questions (the first question of each fact is its edit).
        own: [Q] the fact a question was drawn for; about: [Q] the fact it is about, -1 if none of the F.
        kind: [Q] index into KINDS, or -1 for the samples that only set radii: near and far [Q] mark those.
        edit: [F] the question that is the edit.
    """

    keys: dict[str, Tensor]
    own: Tensor
    about: Tensor
    kind: Tensor
    near: Tensor
    far: Tensor
    edit: Tensor


def _samples_around(sample: EditSample, number: int) -> tuple[list, list]:
    """What a user gets for nothing: rewordings and a brighter image; a black image, other questions."""
    image, prompt = sample.request.image, sample.request.prompt
    near = [(image, wording) for wording in sample.rephrases[:2]]
    near.append((ImageEnhance.Brightness(image).enhance(1.1), prompt))
    others = [QUESTIONS[a].canonical for a in ATTRIBUTES if QUESTIONS[a].canonical != prompt]
    far = [(Image.new("RGB", image.size), prompt), (image, others[number % len(others)])]
    return near, far


def _pooled(hidden: Tensor, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The plain keys [R, ...] of states [R, L, D]; prompts end in the last column."""
    last = hidden[:, -1]

    def mean(mask: Tensor) -> Tensor:
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    score = torch.einsum(
        "rd,rld->rl", nn.functional.normalize(last, dim=1), nn.functional.normalize(hidden, dim=2)
    )
    weight = (10 * score).masked_fill(~image, -1e4).softmax(1) * image
    attended = torch.einsum("rl,rld->rd", weight, hidden)
    found = {"last": last, "question": mean(text), "image": mean(image), "attended": attended}
    units = [nn.functional.normalize(found[name], dim=1) for name in ("last", "question", "attended")]
    return {**found, "together": torch.cat(units, dim=1)}


def read(editor: Editor, samples: list[EditSample], title: str) -> Facts:
    """Run every question through the frozen model once."""
    base = editor.model.get_base_model()
    image_id = base.config.image_token_id
    number_of = {sample.fact: number for number, sample in enumerate(samples)}
    adapter = active_adapter(editor.model)
    layers = list(base.model.language_model.layers)
    keys: dict[str, list[Tensor]] = {}
    own, about, kind, near, far, edit = [], [], [], [], [], []
    for number, sample in enumerate(tqdm(samples, desc=title, unit="fact", mininterval=5)):
        probes = [("rel", sample.request.image, sample.request.prompt, number)]
        for name, found in (*sample.generality.items(), *sample.locality.items()):
            for p in found:
                meant = number if name in sample.generality else number_of.get(p.fact, -1)
                probes.append((name, p.image, p.prompt, meant))
        inside, outside = _samples_around(sample, number)
        edit.append(len(own))
        asked = [(image, prompt) for _, image, prompt, _ in probes] + inside + outside
        own += [number] * len(asked)
        about += [meant for *_, meant in probes] + [-1] * (len(inside) + len(outside))
        kind += [KINDS.index(name) for name, *_ in probes] + [-1] * (len(inside) + len(outside))
        near += [False] * len(probes) + [True] * len(inside) + [False] * len(outside)
        far += [False] * (len(probes) + len(inside)) + [True] * len(outside)
        inputs = editor.prompter.inputs(asked)
        attended = inputs["attention_mask"] != 0
        image = (inputs["input_ids"] == image_id) & attended
        with torch.no_grad(), recording(base) as seen:
            states = base(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        for place in range(len(layers)):
            # hidden_states[i + 1] is what layer i puts out, but the last one is normalised on top.
            if place + 1 < len(layers):
                for name, key in _pooled(states[place + 1], attended & ~image, image).items():
                    keys.setdefault(f"{name}@{place}", []).append(key.to(torch.float16))
        if adapter.config.key == "pooled":
            prompt = runtime_of(base).describe(inputs, tuple(image.shape), image.device)
            keys.setdefault("pooled", []).append(adapter.key_of(seen, prompt).to(torch.float16))
    return Facts(
        {name: torch.cat(parts) for name, parts in keys.items()},
        *(torch.tensor(x) for x in (own, about, kind, near, far, edit)),
    )
