"""The fitted baselines on the embedded model: what their papers report of them, as far as a small model shows it."""

import warnings

import pytest
import torch
from dualedit.baselines import FITTED
from dualedit.toy.baselines import lacks_settings, load_baseline
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts():
    return edit_samples(World(0), "train", 6, seed=31)


def taken(method, facts, questions_of):
    """How many of the facts are answered as told, and how many other questions as before."""
    right = kept = 0
    for sample in facts:
        request, (question, *others) = sample.request, questions_of(sample)
        before = method.answers([question, *others])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method.edit(sample)
        after = method.answers([question, *others])
        right += after[0] == request.target
        kept += sum(a == b for a, b in zip(after[1:], before[1:], strict=True))
        method.reset()
    return right, kept


def asked(sample):
    far = [(p.image, p.prompt) for kind in ("t_loc", "m_loc") for p in sample.locality[kind]]
    return [(sample.request.image, sample.request.prompt), *far]


@pytest.mark.parametrize("name", [*FITTED, "retrieval"])
def test_settings_and_network_are_shipped(name):
    assert lacks_settings(name) is None
    method = load_baseline(name)
    assert method.name == name and method.memory_bytes() == 0
    if name in FITTED:
        assert method.training_seconds > 0
