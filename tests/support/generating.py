"""Answers of tiny models: by `generate`, and by hand."""

import torch
from tiny_models import PAD

NEVER = 10_000  # no token has this id: generations do not end early
NEW = 6


def generate(model, inputs, **more):
    settings = dict(max_new_tokens=NEW, eos_token_id=NEVER, do_sample=False, pad_token_id=PAD)
    return model.generate(**inputs, **(settings | more))[:, -NEW:]


def generate_scored(model, inputs, **more):
    """What `generate` gives for beams, [B, NEW], and their scores [B]."""
    out = model.generate(
        **inputs, max_new_tokens=NEW, eos_token_id=NEVER, do_sample=False, pad_token_id=PAD,
        return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip
    return out.sequences[:, -NEW:], out.sequences_scores


def decode(model, inputs, steps=NEW, between=None, **more):
    """A hand-written greedy loop with a cache: tokens [B, steps], logits [B, steps, V]."""
    tokens, logits = [], []
    mask = inputs["attention_mask"]
    with torch.no_grad():
        out = model(**inputs, use_cache=True, **more)
        for step in range(steps):
            cache = out[1] if isinstance(out, tuple) else out.past_key_values
            last = (out[0] if isinstance(out, tuple) else out.logits)[:, -1]
            logits.append(last)
            tokens.append(last.argmax(-1))
            if between is not None:
                between(step)
            call = {"input_ids": tokens[-1][:, None], "past_key_values": cache, "use_cache": True}
            if not mask.all():
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                call["attention_mask"] = mask
            out = model(**call, **more)
    return torch.stack(tokens, 1), torch.stack(logits, 1)
