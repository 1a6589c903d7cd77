"""One tokenizer, several threads: a fast tokenizer keeps its padding from one call to the next."""

import sys
import threading

import pytest
import torch
from dualedit.models import prompting
from dualedit.models.prompting import Prompter
from tiny_models import random_image, tiny_processor


@pytest.fixture
def faults(generator):
    """What goes wrong where threads ask for batches, which are padded, and for single questions."""
    processor, images = tiny_processor(), [random_image(generator) for _ in range(2)]
    short, long = "what ?", "what brand is this computer ? " * 40
    wanted = {
        count: Prompter(processor).inputs([(images[0], long), (images[1], short)][:count]) for count in (1, 2)
    }

    def ask(number, found):
        # Each thread has a prompter of its own: what they share is the tokenizer.
        prompter, count = Prompter(processor), 1 + number % 2
        for _ in range(60):
            try:
                made = prompter.inputs([(images[0], long), (images[1], short)][:count])
                if not all(torch.equal(made[name], value) for name, value in wanted[count].items()):
                    found.append("another batch")
                prompter.target_ids(images[0], short, "red", None)
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")

    def run():
        found, before = [], sys.getswitchinterval()
        threads = [threading.Thread(target=ask, args=(number, found)) for number in range(6)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        return found

    return run


def test_threads_share_a_tokenizer(faults):
    assert faults() == []


def test_without_the_lock_they_disturb_each_other(faults, monkeypatch):
    """What the lock is for; should a tokenizer come that needs none, the lock can go."""

    class Open:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(prompting, "alone_with", lambda tokenizer: Open())
    assert any(faults() for _ in range(10))
