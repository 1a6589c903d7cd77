"""A method that says what it is told to: for the arithmetic of an evaluation."""

from contextlib import contextmanager

import torch
from dualedit import EditRequest, EditSample, Probe
from dualedit.editor import Explanation
from PIL import Image

UNKNOWN = 0


def picture(number):
    return Image.new("RGB", (2, 2), (number, 0, 0))


class Scripted:
    """Answers by (number of the picture or None, prompt).

    Args:
        before: what the unedited model says.
        after: edit target to what is said while that edit is stored; what is not there stays as before.
        published: the same for a gate that sees the answer; None: as `after`.
        holds: how many edits it remembers, the newest.

    Attributes:
        log: what was done, in order.
    """

    def __init__(self, before, after, published=None, holds=10**9):
        self.name = "scripted"
        self.before, self.after = before, after
        self.published = after if published is None else published
        self.holds = holds
        self.stored, self.log, self.words = [], [], {}
        self._off = False

    def edit(self, sample):
        self.log.append(("edit", sample.request.target))
        self.stored = [*self.stored, sample.request.target][-self.holds :]

    def reset(self):
        self.log.append(("reset",))
        self.stored = []

    @contextmanager
    def unedited(self):
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _says(self, question, table):
        image, prompt = question
        key = (None if image is None else image.getpixel((0, 0))[0], prompt)
        for target in () if self._off else reversed(self.stored):
            if key in table.get(target, {}):
                return table[target][key]
        return self.before.get(key, "as ever")

    def answers(self, questions, max_new_tokens=20):
        self.log.append(("answers", [prompt for _, prompt in questions]))
        return [self._says(question, self.after) for question in questions]

    def explain(self, questions):
        return [
            Explanation(self._says(q, self.after) != self._says(q, {}), None, float("inf"), 0.0)
            for q in questions
        ]

    def _ids(self, text, length):
        ids = [self.words.setdefault(word, len(self.words) + 1) for word in text.split()][:length]
        return torch.tensor(ids + [UNKNOWN] * (length - len(ids)))

    def predictions(self, questions, targets, sees_answer=False):
        table = self.published if sees_answer else self.after
        lengths = [len(target.split()) for target in targets]
        return [
            (self._ids(self._says(question, table), n), self._ids(target, n))
            for question, target, n in zip(questions, targets, lengths, strict=True)
        ]

    def memory_bytes(self):
        return 100 * len(self.stored)


def chain(count):
    """Facts 0 .. count-1; each one's look-alike is the next one."""
    return [
        EditSample(
            EditRequest(picture(i), "who ?", f"new {i}"),
            {"v_gen": [Probe(picture(i), "whose ?")]},
            {"hard_image": [Probe(picture(i + 1), "who ?", f"gold {i + 1}", (i + 1, "who"))]},
            family="who",
            entity=i,
        )
        for i in range(count)
    ]


def chained(count, holds=10**9):
    """Right about each fact that it remembers, in both wordings."""
    after = {f"new {i}": {(i, "who ?"): f"new {i}", (i, "whose ?"): f"new {i}"} for i in range(count)}
    return Scripted({(i, "who ?"): f"old {i}" for i in range(count + 1)}, after, holds=holds)
