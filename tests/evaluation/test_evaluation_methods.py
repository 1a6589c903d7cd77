"""The library's editors as methods: what they predict is what they say, and who sees the answer."""

from types import SimpleNamespace

import pytest
import torch
from dualedit import Editor, inject_dualedit
from dualedit.evaluation import EditorMethod, Method, fit_published_threshold
from dualedit.evaluation.asking import probes_of
from dualedit.evaluation.forcing import forced_batch
from dualedit.evaluation.published import PublishedGate
from dualedit.toy.editors import METHODS, load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World

NEVER = 1 - 1e-7  # a published tau that nothing reaches but the very same input


@pytest.fixture(scope="module")
def samples():
    return edit_samples(World(0), "test", 3, seed=5)


@pytest.fixture(scope="module", params=METHODS)
def method(request, samples):
    """With the edits of the first two samples."""
    opened = EditorMethod(load_editor(request.param), request.param, published_threshold=NEVER)
    for sample in samples[:2]:
        opened.edit(sample)
    return opened


def _questions(sample):
    return [(probe.image, probe.prompt) for _, probe in probes_of(sample)]


def test_teacher_forcing_agrees_with_generation(method, samples):
    """Given its own answer, a model finds each of its tokens most probable; edited rows and others mixed."""
    assert isinstance(method, Method)
    questions = _questions(samples[0])
    fired = [why.fired for why in method.explain(questions)]
    assert any(fired) and not all(fired)
    for predicted, target in method.predictions(questions, method.answers(questions)):
        assert len(target) and torch.equal(predicted, target)
    request = samples[0].request
    ((predicted, target),) = method.predictions([(request.image, request.prompt)], [request.target])
    assert torch.equal(predicted, target)
    eos = method.editor.processor.tokenizer.eos_token_id
    assert eos not in target.tolist()


def test_the_honest_gate_does_not_see_the_answer(method, samples):
    """Whatever answer is put behind the question: the first token is predicted from the question alone."""
    request = samples[0].request
    question = (request.image, request.prompt)
    first = [
        method.predictions([question], [target])[0][0][0].item()
        for target in (request.target, samples[1].request.target, "red")
    ]
    assert len(set(first)) == 1


def test_the_published_gate_sees_nothing_else(method, samples):
    """The same question opens the gate with the edit's answer behind it, and not with another."""
    request = samples[0].request
    question = (request.image, request.prompt)
    batch = forced_batch(method.editor.prompter, [question] * 2, [request.target, "red"])
    ids = [edit.id for edit in method.editor.edits]
    routes = method._published.route(batch, ids).tolist()
    assert routes[0] == 0
    if method.name == "dualedit":  # BalancEdit keeps the radius that its samples gave
        assert routes[1] == -1
        with method.unedited():
            before = method.predictions([question], ["red"])
        assert torch.equal(method.predictions([question], ["red"], sees_answer=True)[0][0], before[0][0])
    told = method.predictions([question], [request.target], sees_answer=True)[0]
    assert torch.equal(*told)


def test_unedited_is_the_base_model_and_reset_brings_it_back(samples):
    method = EditorMethod(load_editor("balancedit"), "balancedit")
    questions = _questions(samples[0])
    targets = [samples[0].request.target] * len(questions)
    base = method.predictions(questions, targets)
    batch = method.editor.prompter.inputs(questions)
    logits = method.editor.model(**batch).logits
    assert method.memory_bytes() == 0
    method.edit(samples[0])
    assert method.memory_bytes() > 0
    with method.unedited():
        for sees_answer in (False, True):
            again = method.predictions(questions, targets, sees_answer)
            assert all(torch.equal(a[0], b[0]) for a, b in zip(base, again, strict=True))
    edited = method.predictions(questions, targets)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(base, edited, strict=True))
    method.reset()
    assert method.memory_bytes() == 0 and method.editor.edits == []
    assert torch.equal(method.editor.model(**batch).logits, logits)
    after = method.predictions(questions, targets, sees_answer=True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(base, after, strict=True))


def test_a_forced_batch_by_hand():
    processor = load_embedded()[1]
    editor = Editor(
        inject_dualedit(load_embedded()[0], text_layer=1, vis_layer=1, mid_dim=8, num_heads=1), processor
    )
    sample = edit_samples(World(0), "test", 1, seed=1)[0]
    questions = [(sample.request.image, sample.request.prompt), (None, "say red")]
    batch = forced_batch(editor.prompter, questions, ["red blue", "green"])
    words = processor.tokenizer.convert_tokens_to_ids(["red", "blue", "green"])
    whole = [editor.prompter.inputs([question])["input_ids"][0].tolist() for question in questions]
    whole = [whole[0] + words[:2], whole[1] + words[2:]]
    length, short = len(whole[0]), len(whole[1])
    assert batch["input_ids"].shape == (2, length) and short < length
    assert batch["input_ids"][0].tolist() == whole[0]
    assert batch["input_ids"][1, :short].tolist() == whole[1]
    assert batch["attention_mask"].sum(1).tolist() == [length, short]
    assert batch["labels"][0].tolist() == [-100] * (length - 2) + words[:2]
    assert batch["labels"][1].tolist() == [-100] * (short - 1) + words[2:] + [-100] * (length - short)
    with pytest.raises(ValueError, match="targets has 1 entries for 2 questions"):
        forced_batch(editor.prompter, questions, ["red"])
    with pytest.raises(ValueError, match="target=' '"):
        forced_batch(editor.prompter, questions, ["red", " "])


def test_what_runs_along_the_tokens_continues_with_them():
    """Types, masks of text and masks of pictures; pixels of the same shape stay as they are."""

    class Words:
        tokenizer = SimpleNamespace(pad_token_id=9)

        def inputs(self, questions):
            sees = torch.tensor([[[0], [3], [4]], [[5], [6], [7]]])  # which pictures each token sees
            return {
                "input_ids": torch.tensor([[9, 1, 2], [3, 4, 5]]),
                "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
                "token_type_ids": torch.zeros(2, 3, dtype=torch.int64),
                "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 1, 0]]),
                "cross_attention_mask": sees,
                "pixel_mask": torch.ones(2, 3),
            }

        def target_ids(self, image, prompt, target, eos):
            assert eos is None
            return torch.tensor([int(word) for word in target.split()])

    batch = forced_batch(Words(), [(None, "a"), (None, "b")], ["6 7", "8"], token_type=1)
    assert {name: value.tolist() for name, value in batch.items() if name != "pixel_mask"} == {
        "input_ids": [[1, 2, 6, 7], [3, 4, 5, 8]],
        "attention_mask": [[1] * 4, [1] * 4],
        "token_type_ids": [[0, 0, 1, 1], [0, 0, 0, 1]],
        "mm_token_type_ids": [[1, 0, 0, 0], [1, 1, 0, 0]],
        "cross_attention_mask": [[[3], [4], [4], [4]], [[5], [6], [7], [7]]],
        "labels": [[-100, -100, 6, 7], [-100, -100, -100, 8]],
    }
    assert batch["pixel_mask"].shape == (2, 3)
    short = forced_batch(Words(), [(None, "a"), (None, "b")], ["6", "8"])
    assert short["input_ids"].tolist() == [[1, 2, 6, 9], [3, 4, 5, 8]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0], [1] * 4]
    assert short["token_type_ids"].tolist() == [[0] * 4] * 2


def test_the_published_threshold_lies_between_related_and_unrelated(monkeypatch, samples):
    """Keys point east; related questions 0.9 and more that way, the others 0.7 and less: 0.8 is between."""
    editor = Editor(
        inject_dualedit(load_embedded()[0], text_layer=1, vis_layer=1, mid_dim=8, num_heads=1),
        load_embedded()[1],
    )
    sample = samples[0]
    related = sum(len(probes) for probes in sample.generality.values())
    others = sum(len(probes) for probes in sample.locality.values())
    cosines = torch.tensor([1.0] + [0.9] * (related - 1) + [0.7] + [0.1] * (others - 1))
    states = torch.stack([cosines, (1 - cosines.square()).clamp(min=0).sqrt()], dim=1)
    monkeypatch.setattr(PublishedGate, "_with_target", lambda *_: torch.tensor([[2.0, 0.0]]))
    monkeypatch.setattr(PublishedGate, "_states", lambda *_: states)
    assert fit_published_threshold(editor, [sample]) == pytest.approx(0.8, abs=1e-6)
    with pytest.raises(ValueError, match="no questions that must change"):
        fit_published_threshold(editor, [])
