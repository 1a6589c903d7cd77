"""The training step: the same losses and gradients as one question at a time through the whole model."""

import pytest
import torch
from dualedit import EditRequest, EditSample, Probe, inject_dualedit
from dualedit.models.architectures import unwrap
from dualedit.models.prompting import Prompter
from dualedit.models.targets import append_target
from dualedit.runtime.context import bound, framed, recording, runtime_of
from dualedit.runtime.partial import PartialForward
from dualedit.runtime.sequence import describe_prompt
from dualedit.training.batches import BatchMaker
from dualedit.training.checkpoint import Checkpoint, full, optimizer_state, restore, weights_of
from dualedit.training.feed import Feed
from dualedit.training.losses import sums_by_term, token_losses
from dualedit.training.parts import Batch, Part
from dualedit.training.questions import questions_of, untrained_terms
from dualedit.training.recipe import TERMS
from dualedit.training.step import TrainingStep
from dualedit.tuners.adapter import active_adapter
from dualedit.tuners.dualedit.modules import EditCrossAttention, EditKV
from tiny_models import BLIP2, EOS, IMAGE, LLAVA, QWEN, WORDS, random_image, strengthen, tiny_processor

ALL = dict.fromkeys(TERMS, 1.0)
QUESTIONS = ["what color is this ?", "who made the computer ?", "what is in the picture ?"]


def facts(count, generator):
    """Edits with a question for every term; the hard one is about the edit's own image."""
    samples = []
    for number in range(count):
        target = ["lenovo", "red apple", "a big dog"][number % 3]
        request = EditRequest(random_image(generator), QUESTIONS[number % 3], target)
        here, prompt = request.image_source, request.prompt
        samples.append(
            EditSample(
                request,
                {
                    "t_gen": [Probe(here, f"question : {prompt}", target)],
                    "v_gen": [Probe(random_image(generator), prompt, target)],
                },
                {
                    "t_loc": [Probe(None, "who made it ?", "acer")],
                    "m_loc": [Probe(random_image(generator), "what brand ?", "dell blue")],
                    "hard_question": [Probe(here, "what is the name of it ?", "cat")],
                },
            )
        )
    return samples


@pytest.fixture
def step(seed):
    torch.manual_seed(seed)
    model = inject_dualedit(
        LLAVA.build(), text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, init_weights=False
    )
    return TrainingStep(strengthen(model).eval())


def batch_of(samples, pack, seed=0, one_by_one=False):
    generators = [torch.Generator().manual_seed(seed + i) for i, _ in enumerate(samples)]
    maker = BatchMaker(Prompter(tiny_processor()), ALL, EOS, [IMAGE], pack, one_by_one)
    return maker(samples, generators)


def outcome(step, batch):
    """The sums of the losses, and the gradients of their mean over the answers."""
    step.zero_grad()
    sums = step(batch)
    (sums / batch.counts().clamp(min=1).float()).sum().backward()
    return sums.detach(), {name: p.grad.clone() for name, p in step.trained().items()}


def one_by_one(step, samples, seed=0):
    """The sums by term, every question alone: no padding, no batch, no shortcut, plain PyTorch losses."""
    base, prompter = step.base, Prompter(tiny_processor())
    layers = active_adapter(step.model).layers
    sums = torch.zeros(len(TERMS))
    for number, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(seed + number)
        kv = {}
        for question in questions_of(sample, 0, ALL, generator):
            probe = question.probe
            inputs = prompter.inputs([(probe.image, probe.prompt)])
            full = append_target(inputs, prompter.target_ids(probe.image, probe.prompt, probe.answer, EOS))
            labels = full.pop("labels")
            with torch.no_grad(), recording(base) as states:
                before = base(**full).logits
            if question.term == "reliability":
                length = torch.tensor([labels.shape[1]])
                kv = {
                    name: {
                        part: EditKV(*adapter.project_edit(states[name][0]), length * 0, length)
                        for part, adapter in layer.dualedit_adapter["default"].items()
                    }
                    for name, layer in layers.items()
                }
            ids = full["input_ids"]
            prompt = describe_prompt(ids, None, labels, [IMAGE], tuple(ids.shape), ids.device)
            with framed(runtime_of(base), "masks", prompt), bound(base, torch.tensor([0]), kv):
                logits = base(**full).logits
            at = labels[0, 1:] != -100
            now, old = (x[0, :-1][at].log_softmax(-1) for x in (logits, before))
            if question.term in TERMS[:3]:
                loss = -now.gather(1, labels[0, 1:][at][:, None]).mean()
            else:
                loss = (old.exp() * (old - now)).sum(-1).mean()
            sums = sums + torch.eye(len(TERMS))[TERMS.index(question.term)] * loss
    return sums


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_every_way_gives_the_losses_of_one_question_at_a_time(pack, partial, step, generator):
    samples = facts(3, generator)
    step.zero_grad()
    expected = one_by_one(step, samples)
    (expected / 3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in step.trained().items()}
    assert (expected[3:] > 1e-3).all()  # the edits do write over what should stay, or nothing is compared
    batch = batch_of(samples, pack)
    assert step.choose_way(batch)
    step.partial = partial
    sums, found = outcome(step, batch)
    torch.testing.assert_close(sums, expected.detach(), rtol=2e-4, atol=1e-5)
    scale = max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm()) < 1e-3 * scale, name


def test_questions_about_one_image_share_a_row(step, generator):
    samples = facts(2, generator)
    plain, packed = batch_of(samples, False), batch_of(samples, True)
    assert sum(len(part.route) for part in plain.parts) == 12
    assert sum(len(part.route) for part in packed.parts) == 8  # wording and hard question ride with the edit
    assert step.same_answers(packed, plain)
    wrong = Part(**{**vars(packed.parts[1]), "inputs": dict(packed.parts[1].inputs)})
    wrong.inputs["position_ids"] = wrong.inputs["position_ids"] + torch.arange(len(wrong.labels[0]))
    spoiled = Batch((packed.parts[0], wrong, *packed.parts[2:]), packed.terms, packed.edits)
    assert wrong.edit_columns is not None
    assert not step.same_answers(spoiled, plain)


def test_an_image_behind_the_question_is_not_packed(step, generator):
    samples = facts(2, generator)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    prompter = Prompter(tiny_processor(), "{prompt} <image>")
    batch = BatchMaker(prompter, ALL, EOS, [IMAGE], pack=True)(samples, generators)
    assert sum(len(part.route) for part in batch.parts) == 12
    assert sum(part.edit_columns is not None for part in batch.parts) == 1
    outcome(step, batch)


def test_recomputing_changes_no_gradient(step, generator):
    batch = batch_of(facts(2, generator), True)
    sums, gradients = outcome(step, batch)
    step.recompute = True
    again, found = outcome(step, batch)
    assert torch.equal(sums, again)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_a_model_whose_layers_do_not_run_alone_runs_whole(step, generator, monkeypatch):
    batch = batch_of(facts(2, generator), True)
    sums, _ = outcome(step, batch)
    head = PartialForward.head
    monkeypatch.setattr(PartialForward, "head", lambda self, states: 2 * head(self, states))
    assert not step.choose_way(batch) and not step.partial
    again, _ = outcome(step, batch)
    torch.testing.assert_close(again, sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [LLAVA, QWEN, BLIP2], ids=lambda family: family.name)
@pytest.mark.parametrize("layers", [(1, 2), (2, 1), (3, 3), (0, None), (None, 3)])
def test_other_architectures_and_layers(family, layers, generator):
    """Rows made of raw ids: the layers on their own give what the whole model gives."""
    torch.manual_seed(0)
    places = dict(zip(("text_layer", "vis_layer"), layers, strict=True))
    model = inject_dualedit(family.build(), **places, mid_dim=16, num_heads=2, init_weights=False)
    step = TrainingStep(strengthen(model).eval())
    rows = family.questions(3, generator)
    ids = rows["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:] % WORDS
    answer = torch.where(labels == -100, -1, torch.arange(3)[:, None])
    prompt = describe_prompt(ids, rows["attention_mask"], labels, [IMAGE], tuple(ids.shape), ids.device)
    columns = rows["attention_mask"] != 0
    part = Part(rows, prompt, labels, answer, torch.arange(3), columns, True)
    batch = Batch((part,), torch.tensor([0, 1, 4]), 3)
    whole = outcome(step, batch) if not step.choose_way(batch) else None
    assert whole is None  # all three families run by parts
    found = outcome(step, batch)
    step.partial = False
    expected = outcome(step, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=1e-5)
    scale = max(float(g.norm()) for g in expected[1].values())
    # (None, 3): nothing reads image positions behind the last layer, and all gradients are zero.
    assert all(float((found[1][n] - expected[1][n]).norm()) <= 1e-3 * scale for n in found[1])


def test_an_edit_without_an_image_trains(step, generator):
    request = EditRequest(None, "who made the computer ?", "acer")
    sample = EditSample(request, {"t_gen": [Probe(None, "what made it ?", "acer")]}, {})
    both = [sample, *facts(1, generator)]
    batch = batch_of(both, True)
    assert step.choose_way(batch)
    sums, gradients = outcome(step, batch)
    step.partial = False
    torch.testing.assert_close(outcome(step, batch)[0], sums, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(one_by_one(step, both).detach(), sums, rtol=2e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_a_batch_without_images_leaves_no_weight_without_a_gradient(step):
    """Processes that have images in their share wait for those that have none."""
    request = EditRequest(None, "who made the computer ?", "acer")
    _, gradients = outcome(step, batch_of([EditSample(request, {}, {})], True))
    unused = {name for name in gradients if ".vision." in name}
    assert unused and all(not gradients[name].any() for name in unused)
    assert all(gradients[name].any() for name in gradients.keys() - unused if "k_proj.bias" not in name)


def test_losses_are_means_over_each_answers_tokens():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    label, answer = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 0, 1, 1])
    each = token_losses(logits, None, label, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(each, torch.nn.functional.cross_entropy(logits, label, reduction="none"))
    sums = sums_by_term(each, answer, torch.tensor([0, 2]))
    torch.testing.assert_close(sums, torch.tensor([each[:3].mean(), 0, each[3:].mean(), 0, 0, 0]))


def test_what_must_stay_is_compared_with_the_model_before(generator):
    logits, before = torch.randn(2, 3, 7, generator=generator)
    change = torch.tensor([False, True, False])
    each = token_losses(logits, before, torch.tensor([1, 2, 3]), change)
    now, old = logits.log_softmax(-1), before.log_softmax(-1)
    wanted = (old.exp() * (old - now)).sum(-1)
    wanted[1] = -now[1, 2]
    torch.testing.assert_close(each, wanted)


def test_by_difficulty_wrong_tokens_weigh_more_and_what_must_stay_weighs_the_same():
    losses = torch.tensor([0.0, 3.0, 0.5, 0.2], requires_grad=True)
    answer, terms = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 3])
    sums = sums_by_term(losses, answer, terms, by_difficulty=True)
    weight = 1 - (-losses.detach()[:3]).exp() + 0.05
    weight = weight / weight.mean()
    wanted = [(losses[:2] * weight[:2]).mean(), losses[2] * weight[2], 0, losses[3], 0, 0]
    torch.testing.assert_close(sums, torch.tensor(wanted))
    sums.sum().backward()
    assert losses.grad[1] > 5 * losses.grad[0] and losses.grad[3] == 1


def test_terms_without_a_weight_or_a_question_are_left_out(generator):
    sample = facts(1, generator)[0]
    only = {**dict.fromkeys(TERMS, 0.0), "image_locality": 1.0}
    terms = [q.term for q in questions_of(sample, 0, only, torch.Generator())]
    assert terms == ["reliability", "image_locality"]  # the edit is read in any case
    bare = EditSample(sample.request, {}, {"m_loc": [Probe(random_image(generator), "what ?", None)]})
    assert [q.term for q in questions_of(bare, 0, ALL, torch.Generator())] == ["reliability"]
    assert untrained_terms([bare, sample], ALL) == []
    assert untrained_terms([bare], {**ALL, "text_locality": 0.0}) == [
        "text_generality", "image_generality", "image_locality", "hard_locality",
    ]  # fmt: skip


def test_wordings_kept_for_a_test_are_not_trained(generator):
    sample = facts(1, generator)[0]
    reworded = EditSample(sample.request, sample.generality, sample.locality, ["name it"])
    for seed in range(20):
        found = questions_of(reworded, 0, ALL, torch.Generator().manual_seed(seed))
        assert {q.probe.prompt for q in found if q.term in TERMS[:3]} == {sample.request.prompt, "name it"}


def test_what_was_folded_is_forgotten_before_any_optimiser_steps(generator):
    """A user's own fused optimiser counts no version, and a look before backward or behind the step may not
    switch modes."""
    adapter = EditCrossAttention(16, 8, 2, init_weights=False)
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.1, fused=True)
    states = torch.randn(5, 16, generator=generator)
    for _ in range(2):
        weight, bias = adapter.query_weights()
        with torch.no_grad():
            before = adapter.query_weights()[
                0
            ].clone()  # a look between forward and backward folds them again
        (states @ weight.T + bias).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            found = adapter.query_weights()[0].clone()
            adapter._folded = None
            assert not torch.equal(found, before) and torch.equal(found, adapter.query_weights()[0])


def feed(count, **more):
    settings = {"batch_size": 4, "seed": 7} | more
    return Feed(
        range(count),
        lambda some, generators: (list(some), [g.initial_seed() for g in generators]),
        **settings,
    )


def test_batches_depend_on_their_number_alone():
    one = feed(10)
    expected = [one.batches(step) for step in range(9)]
    assert [one.batches(step) for step in reversed(range(9))] == expected[::-1]
    assert list(feed(10).ahead(3, 9)) == expected[3:]
    seen = [sample for step in range(5) for samples, _ in one.batches(step) for sample in samples]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert feed(10, seed=8).batches(0) != expected[0]
    assert len({seed for step in expected for _, seeds in step for seed in seeds}) == 36


def test_processes_share_a_batch_between_them():
    whole = [(s, g) for samples, seeds in feed(10).batches(3) for s, g in zip(samples, seeds, strict=True)]
    shared = []
    for process in range(2):
        parts = feed(10, process=process, processes=2, accumulate=2).batches(3)
        assert [len(samples) for samples, _ in parts] == [1, 1]
        shared += [(s, g) for samples, seeds in parts for s, g in zip(samples, seeds, strict=True)]
    assert sorted(shared) == sorted(whole)
    with pytest.raises(ValueError, match="batch_size=4 cannot be divided by 3 processes"):
        feed(10, processes=3)


def test_held_out_edits_come_once_each():
    for processes in (1, 2, 3):
        shares = [{"process": p, "processes": processes} for p in range(processes)]
        feeds = [feed(7, batch_size=6, shuffle=False, once=True, **share) for share in shares]
        seen = [
            s for f in feeds for n in range(f.steps_of_all()) for samples, _ in f.batches(n) for s in samples
        ]
        assert sorted(seen) == list(range(7))


def test_a_fault_in_the_background_comes_to_the_front():
    def broken(some, generators):
        raise ValueError("image='x.png': no such file.")

    with pytest.raises(ValueError, match="no such file"):
        next(Feed(range(4), broken, 2).ahead(0, 5))


def test_unwrapped_model_is_left_as_it_was(step, generator):
    """Layers that a forward left out run as before after a step, and after an error in it."""
    layers = list(unwrap(step.model).model.language_model.layers)
    batch = batch_of(facts(2, generator), True)
    outcome(step, batch)
    batch.parts[0].inputs["pixel_values"] = batch.parts[0].inputs["pixel_values"][:, :2]
    with pytest.raises((RuntimeError, ValueError)):
        step(batch)
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert runtime_of(step.base).current_pass() is None


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, as FSDP wants one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_cut_up_by_fsdp(process_group, step, generator):
    """Decoder layers and the rest cut up as the shipped configuration cuts them; saved and restored whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batch = batch_of(facts(2, generator), True)
    sums, gradients = outcome(step, batch)
    before = weights_of(step.trained())
    mesh = init_device_mesh("cpu", (1,))
    for layer in list(unwrap(step.model).model.language_model.layers):
        fully_shard(getattr(layer, "base_layer", layer), mesh=mesh)
    fully_shard(step, mesh=mesh)
    trained = step.trained()
    assert all(hasattr(parameter, "placements") for parameter in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), 0.01)
    found = step(batch)
    (found / batch.counts().clamp(min=1).float()).sum().backward()
    torch.testing.assert_close(found.detach(), sums, rtol=1e-5, atol=1e-6)
    scale = max(float(g.norm()) for g in gradients.values())
    for name, parameter in trained.items():
        assert float((full(parameter.grad) - gradients[name]).norm()) < 1e-4 * scale, name
    optimizer.step()
    after, state = weights_of(trained), optimizer_state(optimizer, trained)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    restore(Checkpoint(0, before, {}, [], None, {}, "", {}), trained, optimizer)
    assert all(torch.equal(full(trained[name]), before[name]) for name in before)
    restore(Checkpoint(1, after, state, [], None, {}, "", {}), trained, optimizer)
    again = optimizer_state(optimizer, trained)
    assert all(torch.equal(full(trained[name]), after[name]) for name in after)
    assert all(torch.equal(again[name][key], state[name][key]) for name in state for key in state[name])
