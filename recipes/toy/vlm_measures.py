"""Measuring the embedded model: held-out accuracy per family, and what a gate can tell from its states."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from dualedit.data import Probe
from dualedit.toy.model import format_prompt
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, World
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

GENERALITY = ("t_gen", "v_gen")
OTHERS = ("hard_image", "hard_question", "same_question", "m_loc", "t_loc")


@dataclass(frozen=True)
class Case:
    """One question of the held-out check; ``family`` says what kind, ``fact`` which (entity, attribute)."""

    family: str
    image: Image.Image | None
    question: str
    answer: str
    fact: tuple[int, str] | None = None


def held_out_cases(world: World, per_family: int, seed: int = 1) -> list[Case]:
    """New pictures and random wordings of every family; digits are ones that training never showed.

    Scenes come twice: new pictures of known combinations of shape, colour and size (``scene_...``) and
    combinations that training never showed (``unseen_scene_...``).
    """
    rng = np.random.default_rng([seed, 77])
    cases: list[Case] = []
    for attribute in ATTRIBUTES:
        for entity in rng.choice(len(world.logos), size=per_family, replace=per_family > len(world.logos)):
            wordings = QUESTIONS[attribute].all
            question = wordings[int(rng.integers(len(wordings)))]
            fact = (int(entity), attribute)
            cases.append(Case(attribute, world.render(fact[0], rng), question, world.answer(*fact), fact))
    for _ in range(per_family):
        entity = int(rng.integers(len(world.logos)))
        pictures = [
            ("", world.render(entity, rng), world.look_asks(entity, rng)),
            ("", *world.digit(rng, held_out=True)),
            ("", *world.scene(rng)),
            ("unseen_", *world.scene(rng, held_out=True)),
        ]
        for prefix, image, asks in pictures:
            cases.extend(Case(prefix + ask.family, image, ask.question, ask.answer) for ask in asks)
    for family in sorted({fact.family for fact in world.text_facts}):
        facts = [fact for fact in world.text_facts if fact.family == family]
        for _ in range(per_family):
            fact = facts[int(rng.integers(len(facts)))]
            question = fact.questions[int(rng.integers(len(fact.questions)))]
            cases.append(Case(family, None, question, fact.answer))
    return cases


def _inputs(processor: LlavaProcessor, questions: list[tuple[Image.Image | None, str]]) -> dict:
    """Left-padded processor output for questions that all have, or all lack, an image."""
    texts = [format_prompt(processor, question, image is not None) for image, question in questions]
    images = [image for image, _ in questions if image is not None]
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True)


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: list[tuple[Image.Image | None, str]],
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers by the processor and ``model.generate``, in the order asked."""
    found = [""] * len(questions)
    for with_image in (True, False):
        order = [i for i, (image, _) in enumerate(questions) if (image is not None) == with_image]
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            inputs = _inputs(processor, [questions[i] for i in part])
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                found[i] = text.strip()
    return found


def accuracies(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, cases: list[Case]
) -> dict[str, float]:
    """Exact-match accuracy of generated answers per family, and over all cases as ``"overall"``."""
    right: dict[str, list[bool]] = defaultdict(list)
    found = answers(model, processor, [(case.image, case.question) for case in cases])
    for case, text in zip(cases, found, strict=True):
        right[case.family].append(text == case.answer)
    result = {family: float(np.mean(hits)) for family, hits in right.items()}
    result["overall"] = float(np.mean([hit for hits in right.values() for hit in hits]))
    return result


def last_token_states(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: list[tuple],
    batch_size: int = 64,
) -> torch.Tensor:
    """Unit-length last-prompt-token states [N, layers + 1, D]; index l is the output of layer l."""
    states = torch.empty(0)
    for with_image in (True, False):
        order = [i for i, (image, _) in enumerate(questions) if (image is not None) == with_image]
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            with torch.no_grad():
                out = model.model(
                    **_inputs(processor, [questions[i] for i in part]), output_hidden_states=True
                )
            last = torch.stack([hidden[:, -1] for hidden in out.hidden_states], dim=1)
            if not len(states):
                states = last.new_zeros(len(questions), *last.shape[1:])
            states[part] = torch.nn.functional.normalize(last, dim=-1)
    return states


def gate_cosines(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: World,
    split: str,
    count: int,
    seed: int = 3,
) -> dict[str, torch.Tensor]:
    """Cosines of probes with their request, per kind of probe: [probes, layers + 1].

    ``same_question`` is the request's question about the next samples' logos: other entities, any family.
    """
    samples = edit_samples(world, split, count, seed)
    questions: list[tuple] = [(s.request.image, s.request.prompt) for s in samples]
    kinds: list[str] = []
    owners: list[int] = []
    for number, sample in enumerate(samples):
        others = [samples[(number + k) % count] for k in (1, 2)]
        probes = {
            **sample.generality,
            **sample.locality,
            "same_question": [
                Probe(o.request.image, sample.request.prompt) for o in others if o.entity != sample.entity
            ],
        }
        for kind, found in probes.items():
            questions.extend((probe.image, probe.prompt) for probe in found)
            kinds.extend([kind] * len(found))
            owners.extend([number] * len(found))
    states = last_token_states(model, processor, questions)
    cosine = (states[:count][owners] * states[count:]).sum(-1)
    return {kind: cosine[[k == kind for k in kinds]] for kind in (*GENERALITY, *OTHERS)}


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive's cosine exceeds a negative's (ties count half)."""
    both = np.concatenate([positive, negative])
    order = both.argsort(kind="stable")
    ranks = np.empty(len(both))
    ranks[order] = np.arange(1, len(both) + 1)
    for value in np.unique(both[np.isin(both, positive) & np.isin(both, negative)]):
        ranks[both == value] = ranks[both == value].mean()
    return float(
        (ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2)
        / (len(positive) * len(negative))
    )


def gate_separation(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, world: World, count: int = 200
) -> list[dict[str, float]]:
    """What a plain cosine gate on the last prompt token can tell, per layer (index 0 = embeddings).

    The threshold is set on train entities (where the accepted share of t_gen and v_gen minus the accepted
    share of hard images and hard questions is largest) and applied to test entities.  Per layer:
    ``threshold``, AUC of generality against each other kind (``auc_<kind>``) and the share of each kind
    accepted (``accept_<kind>``).
    """
    train = {k: v.numpy() for k, v in gate_cosines(model, processor, world, "train", count).items()}
    test = {k: v.numpy() for k, v in gate_cosines(model, processor, world, "test", count).items()}
    rows = []
    for layer in range(train["t_gen"].shape[1]):
        near = np.concatenate([train[k][:, layer] for k in GENERALITY])
        far = [train[k][:, layer] for k in ("hard_image", "hard_question")]
        levels = np.unique(np.quantile(np.concatenate([near, *far]), np.linspace(0, 1, 400)))
        gain = [(near >= t).mean() - np.mean([(f >= t).mean() for f in far]) for t in levels]
        threshold = float(levels[int(np.argmax(gain))])
        positive = np.concatenate([test[k][:, layer] for k in GENERALITY])
        row = {"layer": layer, "threshold": threshold}
        row |= {f"auc_{k}": _auc(positive, test[k][:, layer]) for k in OTHERS}
        row |= {f"accept_{k}": float((test[k][:, layer] >= threshold).mean()) for k in (*GENERALITY, *OTHERS)}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows
