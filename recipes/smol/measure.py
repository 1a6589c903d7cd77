"""Step 5: free generation on pictures by artists of a role, beside majority baselines, and on text.

A text counts where the answer is, to the letter, that of SmolLM2 as it came.

python recipes/smol/measure.py --role validation     # to choose
python recipes/smol/measure.py --role test           # once, at the end
"""

import argparse
import json
import random
import re
import time
from collections import Counter

import torch
from common import base
from dualedit.smol import load_concepts, load_smol
from dualedit.smol.model import widen
from PIL import Image
from questions import ABOUT_PICTURES, text_questions


def plain(text: str) -> str:
    """Lower case, no punctuation, no article in front."""
    text = re.sub(r"[^\w\s]", " ", text.lower())
    return re.sub(r"^(the|a|an) ", "", " ".join(text.split()))


@torch.inference_mode()
def answers(model, processor, rows, batch: int = 16, tokens: int = 16) -> list[str]:
    """Greedy answers to (path or None, question) rows; all of one call have a picture, or none has."""
    out = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": ([{"type": "image"}] if path else []) + [{"type": "text", "text": q}],
                    }
                ],
                add_generation_prompt=True,
            )
            for path, q in part
        ]
        pictures = [Image.open(path).convert("RGB") for path, _ in part if path]
        inputs = processor(
            text=texts, images=pictures or None, return_tensors="pt", padding=True, add_special_tokens=False
        )
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        out += processor.batch_decode(made, skip_special_tokens=True)
    return [text.strip() for text in out]


def wilson(right: int, count: int) -> str:
    """Per cent with the 95 % interval of Wilson."""
    p, z = right / count, 1.96
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    return f"{100 * p:5.1f} [{100 * (middle - half):.1f}, {100 * (middle + half):.1f}] of {count}"


def main(role: str, limit: int, texts: int, seen: bool, seed: int):
    torch.set_num_threads(1)
    model, processor = load_smol()
    concepts = load_concepts()
    rng = random.Random(seed)
    rows = {}
    for concept in concepts:
        if concept.seen != seen:
            continue
        for path in concept.by_role(role).values():
            for key, accepted in concept.accepted.items():
                label = "brand" if concept.family == "logos" else key
                rows.setdefault(label, []).append((path, accepted, concept.facts[key]))
    start, result = time.time(), {}
    for key, asked in rows.items():
        asked = rng.sample(asked, min(limit, len(asked)))
        if not asked:
            continue
        question = ABOUT_PICTURES[key][0]
        said = answers(model, processor, [(path, question) for path, *_ in asked])
        right = sum(plain(s) in map(plain, accepted) for s, (_, accepted, _) in zip(said, asked, strict=True))
        common = Counter(fact for *_, fact in asked).most_common(1)[0][0]
        majority = sum(plain(common) in map(plain, accepted) for _, accepted, _ in asked)
        result[key] = {"right": right, "count": len(asked), "majority": majority, "always": common}
        print(
            f"{key:10s} {wilson(right, len(asked))}; always {common!r}: {100 * majority / len(asked):.1f}",
            flush=True,
        )
        print("          ", [(s, f) for s, (*_, f) in zip(said[:6], asked[:6], strict=True)], flush=True)
    if texts:
        part = "validation" if role == "validation" else "test"
        questions = [(None, q) for q in text_questions(concepts, part, texts, seed)]
        own = answers(model, processor, questions, tokens=24)
        language, _ = base()
        state = {k: v for k, v in language.model.state_dict().items() if "embed" not in k}
        widen(state, model.config.text_config, {})
        model.model.language_model.load_state_dict(state, strict=False)
        before = answers(model, processor, questions, tokens=24)
        same = sum(a == b for a, b in zip(own, before, strict=True))
        result["text"] = {"right": same, "count": len(questions)}
        print(f"text: the answer of SmolLM2 as it came {wilson(same, len(questions))}", flush=True)
        print("          ", [pair for pair in zip(own, before, strict=True) if pair[0] != pair[1]][:4])
    print(json.dumps({"role": role, "seen": seen, "seconds": round(time.time() - start), **result}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--role", choices=["validation", "test"], default="validation")
    parser.add_argument("--limit", type=int, default=300, help="questions of each kind")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--unseen", action="store_true", help="concepts that training did not see")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.role, given.limit, given.texts, not given.unseen, given.seed)
