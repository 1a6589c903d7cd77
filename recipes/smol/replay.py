"""Step 2: text without pictures, written by the language model as it came: what training must leave as it is.

Questions of three kinds: about the concepts by name, everyday ones, and ones that the model asks itself
(sampled after the opening of a user's turn). Each gets the model's own greedy answer, and the last hidden
state of every position is kept, so that training can compare whole distributions.

    python recipes/smol/replay.py
"""

import random
import time

import torch
from common import WORK, base, language_model, save
from dualedit.smol import load_concepts
from questions import text_questions

OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@torch.inference_mode()
def generate(model, tokenizer, prompts, tokens=24, sample=False, batch=96):
    """The new tokens of each prompt, greedy or sampled, up to the end of the turn."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids = [tokenizer(prompts[i], add_special_tokens=False)["input_ids"] for i in part]
        width = max(map(len, ids))
        x = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        y = model.generate(
            input_ids=x,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=sample,
            pad_token_id=2,
            eos_token_id=2,
        )[:, width:]
        for i, row in zip(part, y.tolist(), strict=True):
            out[i] = row[: row.index(2) + 1] if 2 in row else row
    return out


@torch.inference_mode()
def last_states(model, rows, batch=32):
    """The last hidden states of every position of each row of ids, float16 [T, D]."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [None] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(rows[i]) for i in part)
        # Padded on the right, where nothing before it looks.
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in part])
        states = model.model(input_ids=ids).last_hidden_state.half()
        for i, found in zip(part, states, strict=True):
            out[i] = found[: len(rows[i])].clone()
    return out


def main(asked: int = 240, seed: int = 0):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = language_model(torch.bfloat16)
    tokenizer = base()[1]
    start = time.time()
    prompts = [OPEN + q + CLOSE for q in text_questions(load_concepts(), "training", 640, seed)]
    own = generate(model, tokenizer, [OPEN] * asked, 28, sample=True)
    own = [tokenizer.decode([t for t in row if t != 2]).strip() for row in own]
    own = [q for q in dict.fromkeys(own) if 8 < len(q) < 160]
    print(f"{len(own)} questions of its own in {time.time() - start:.0f} s:", own[:5], flush=True)
    prompts += [OPEN + q + CLOSE for q in own]
    random.Random(seed).shuffle(prompts)
    answers = generate(model, tokenizer, prompts)
    print(f"answers {time.time() - start:.0f} s", [tokenizer.decode(a) for a in answers[:6]], flush=True)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        p = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows.append((p + answer[:-1], len(p)))
    states = last_states(model, [ids for ids, _ in rows])
    save(WORK / "replay.pt", ids=[r[0] for r in rows], prompt=[r[1] for r in rows], states=states)
    print(f"{len(rows)} texts, {sum(len(r[0]) for r in rows)} tokens, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
