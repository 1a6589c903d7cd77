"""Fitted baselines on the embedded model: what their papers report, as far as a small model shows it."""

import warnings

import pytest
from dualedit.baselines import BASELINES, FITTED, mend, open_baseline
from dualedit.toy.baselines import baseline_settings, lacks_settings, load_baseline
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World

pytestmark = pytest.mark.slow

SHIPPED = tuple(name for name in BASELINES if lacks_settings(name) is None)


@pytest.fixture(scope="module")
def facts():
    return edit_samples(World(0), "train", 6, seed=31)


def asked(sample):
    """The edit's question, and questions that it does not concern."""
    far = [(p.image, p.prompt) for kind in ("t_loc", "m_loc") for p in sample.locality[kind]]
    return [(sample.request.image, sample.request.prompt), *far]


def taken_and_kept(method, facts):
    """How many facts are answered as told after one edit, and how many other questions as before."""
    taken = kept = 0
    for sample in facts:
        before = method.answers(asked(sample))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method.edit(sample)
        after = method.answers(asked(sample))
        taken += after[0] == sample.request.target
        kept += sum(a == b for a, b in zip(after[1:], before[1:], strict=True))
        method.reset()
    return taken, kept


def test_methods_are_shipped_with_settings():
    assert {"ft-l", "ft-v", "lora", "grace", "mend", "retrieval"} <= set(SHIPPED)
    for name in set(SHIPPED) & set(FITTED):
        assert load_baseline(name).training_seconds > 0


def test_mend_writes_in_one_step_what_the_plain_gradient_does_not(facts):
    """As the paper reports: one forward, one backward and its network do what a step of gradient does not."""
    trained = load_baseline("mend")
    taken, kept = taken_and_kept(trained, facts)
    assert taken >= 5 and kept >= 23
    plain = mend.MEND(*load_embedded(), None, plain_settings())
    assert taken_and_kept(plain, facts)[0] <= 1


def plain_settings():
    """MEND's layers with an untrained network, which is one step of gradient descent at its first rate."""
    settings = baseline_settings("mend")
    return type(settings)(rank=settings.rank, layers=settings.layers, modules=settings.modules)


def test_a_retrieved_note_is_told_to_the_edits_own_questions_alone(facts):
    method = load_baseline("retrieval")
    taken, kept = taken_and_kept(method, facts)
    assert taken >= 5 and kept == 24
    method.edit(facts[0])
    own, *others = method.explain(asked(facts[0]))
    assert own.fired and own.edit.target == facts[0].request.target
    assert not any(why.fired for why in others)


def test_opening_without_settings_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="tune_baselines"):
        load_baseline("mend", weights=tmp_path)
    (tmp_path / "baselines.json").write_text("{}")
    with pytest.raises(ValueError, match="no settings of 'mend': tune it with .* --only mend"):
        load_baseline("mend", weights=tmp_path)
    assert "no settings" in lacks_settings("mend", tmp_path) and lacks_settings("ike", tmp_path) is None
    with pytest.raises(ValueError, match="has to be fitted"):
        open_baseline("mend", *load_embedded())
