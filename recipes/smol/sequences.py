"""Sequences of one picture, or none, and several questions that do not see each other, as batches."""

import torch
import torch.nn.functional as F
from common import SIDE

TOKENS = (SIDE // 32) ** 2
BF = torch.bfloat16


class Packer:
    """Sequences of one picture (or none) and questions that do not see each other."""

    def __init__(self, model, tokenizer):
        self.embed = model.model.embed_tokens.weight
        self.tokenizer, self.cache = tokenizer, {}
        self.before = self.ids("<|im_start|>user\n")
        self.after = self.ids("\n")

    def ids(self, text):
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def sequence(self, pairs, shown=range(TOKENS)):
        """(tokens, positions, segments, [(place, label)]) of a picture's questions and answers."""
        start, first = len(self.before), len(self.before) + TOKENS + len(self.after)
        tokens = self.before + [0] * len(shown) + self.after
        positions = [*range(start), *(start + t for t in shown), *range(start + TOKENS, first)]
        segments, labels = [0] * len(tokens), []
        for k, (question, answer) in enumerate(pairs):
            q = self.ids(question + "<|im_end|>\n<|im_start|>assistant\n")
            a = self.ids(answer + "<|im_end|>")
            at = len(tokens) + len(q) - 1
            labels += [(at + j, t) for j, t in enumerate(a)]
            tokens = tokens + q + a[:-1]
            positions += range(first, first + len(q) + len(a) - 1)
            segments += [k + 1] * (len(q) + len(a) - 1)
        return tokens, positions, segments, labels

    def batch(self, sequences, pictures):
        """Embeddings [B, T, D], mask [B, 1, T, T], positions [B, T], places [K, 2], labels [K].

        `sequences`: as `sequence` makes them, the first `len(pictures)` with a picture; `pictures` [P,
        shown, D].
        """
        width, rows = max(len(s[0]) for s in sequences), len(sequences)
        ids = torch.zeros(rows, width, dtype=torch.long)
        positions = torch.zeros(rows, width, dtype=torch.long)
        segments = torch.full((rows, width), -1)
        places, labels = [], []
        for b, (tokens, position, segment, label) in enumerate(sequences):
            n = len(tokens)
            ids[b, :n], positions[b, :n] = torch.tensor(tokens), torch.tensor(position)
            segments[b, :n] = torch.tensor(segment)
            places += [(b, t) for t, _ in label]
            labels += [t for _, t in label]
        seen = torch.ones(width, width, dtype=torch.bool).tril()[None]
        seen = seen & ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None]))
        mask = torch.zeros(rows, 1, width, width, dtype=BF).masked_fill_(~seen[:, None], torch.finfo(BF).min)
        x = F.embedding(ids, self.embed)
        if len(pictures):
            start = len(self.before)
            x = x.clone()
            x[: len(pictures), start : start + pictures.shape[1]] = pictures.to(BF)
        return x, mask, positions, torch.tensor(places), torch.tensor(labels)
