"""Trainer, accelerate and FSDP2 around an edited model: train, save, go on from an empty memory."""

import copy

import pytest
import torch
import torch.distributed as dist
from dualedit import DualEditConfig, inject_dualedit, list_edits, load_edits, lookup, save_edits
from dualedit.models.targets import append_target
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAVA, METHODS, edit_layers, editor_of, row_of, store, strengthen
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may

DUAL = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def empty_dualedit():
    return inject_dualedit(LLAVA.build(), **DUAL)


def empty_beside_lora():
    """A LoRA that is trained, with DualEdit around two of the layers that it is in.

    Both have names: Trainer of transformers 5.17 forgets a "default" that lies beside other adapters.
    """
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    return inject_dualedit(get_peft_model(LLAVA.build(), config, "style"), adapter_name="facts", **DUAL)


@pytest.fixture(params=[empty_dualedit, empty_beside_lora], ids=["dualedit", "beside a lora"])
def build(request):
    return request.param


@pytest.fixture
def edited(build, generator, seed):
    """An edited model, and one training row for each of its questions."""
    torch.manual_seed(seed)
    model = strengthen(build())
    questions = [LLAVA.question(generator) for _ in range(4)]
    for question in questions[:3]:
        store(model, question, generator)
    targets = torch.randint(3, 100, (4, 3), generator=generator)
    rows = []
    for question, target in zip(questions, targets, strict=True):
        rows.append({name: value[0] for name, value in append_target(question, target).items()})
    return model, questions, rows


def trainer_of(model, rows, folder, steps):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=1, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, report_to=[], seed=1, data_seed=1,
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip

    def collate(batch):
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}

    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def trained_parts(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_saves_and_resumes_into_an_empty_memory(build, edited, tmp_path):
    """Four steps in one go, and two steps, a checkpoint, and two more in another process's model."""
    model, questions, rows = edited
    start, half, rest = trained_parts(model), copy.deepcopy(model), build()
    assert start
    trainer = trainer_of(model, rows, tmp_path / "whole", 4)
    trainer.train()
    whole = trained_parts(model)
    changed = [name for name in whole if not torch.equal(whole[name], start[name])]
    # Keys and values of stored edits are what they were: their projections get no gradient, all others do.
    assert {name for name in whole if name not in changed} == {
        name for name in whole if any(part in name for part in ("k_proj", "v_proj", "edit_norm"))
    }
    trainer_of(half, rows, tmp_path / "half", 2).train()
    assert not torch.equal(trained_parts(half)[changed[0]], whole[changed[0]])
    resumed = trainer_of(rest, rows, tmp_path / "half", 4)
    assert not any(len(g) for g in rest.get_base_model()._dualedit_runtime.groups.values())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, value in trained_parts(rest).items():
        assert torch.equal(value, whole[name]), name
    assert [edit.id for edit in list_edits(rest)] == [1, 2, 3]
    for each in (model, rest):
        each.eval()
    for question in questions:
        assert torch.equal(logits_of(rest, question), logits_of(model, question))


def test_a_checkpoint_of_trainer_is_a_saved_folder(edited, tmp_path):
    model, questions, rows = edited
    trainer_of(model, rows, tmp_path, 1).train()
    name = next(name for name, config in model.peft_config.items() if isinstance(config, DualEditConfig))
    folder = tmp_path / "checkpoint-1" / ("" if name == "default" else name)
    loaded = load_edits(LLAVA.build(), folder)
    assert [edit.id for edit in list_edits(loaded)] == [1, 2, 3]
    if name == "default":
        model.eval()
        assert torch.equal(logits_of(loaded, questions[0]), logits_of(model, questions[0]))


def test_accelerate_saves_and_loads_its_state(edited, build, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, questions, rows = edited
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(**{name: value[None] for name, value in rows[0].items()}).loss
    accelerator.backward(loss)
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.free_memory()
    other = build()
    accelerator = accelerate.Accelerator(cpu=True)
    other = accelerator.prepare(other)
    accelerator.load_state(str(tmp_path / "state"))
    assert [edit.id for edit in list_edits(other)] == [1, 2, 3]
    for each in (model, other):
        each.eval().requires_grad_(False)
    for question in questions:
        assert torch.equal(logits_of(other, question), logits_of(model, question))
    # Unwrapped for saving, as its users do.
    folder = tmp_path / "edits"
    save_edits(accelerator.unwrap_model(other), folder)
    assert list(folder.rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_copies(method, generator):
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    expected = logits_of(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other, inputs), expected)
    store(other, row_of(inputs, 2), generator)
    assert lookup(other, row_of(inputs, 2)).fired and not lookup(model, row_of(inputs, 2)).fired
    assert torch.equal(logits_of(model, inputs), expected)


# ---------------------------------------------------------------------- FSDP2


@pytest.fixture
def one_process():
    """A process group of one, on gloo."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    base = model.get_base_model()
    try:
        for layer in base.get_submodule(LLAVA.layers):
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(base, mesh=mesh)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"fully_shard on CPU: {error}")
    return model


def full_state(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@pytest.mark.parametrize(
    ("method", "more"), [("dualedit", {}), ("balancedit", {}), ("balancedit", {"value": "full"})]
)
def test_fsdp2_in_one_process(method, more, one_process, generator, tmp_path):
    """Sharded: the same answers, edits made and found, saved, and loaded on a model in one piece."""
    from torch.distributed.tensor import DTensor

    plain = editor_of(LLAVA, method, **more)
    inputs = LLAVA.questions(3, generator)
    store(plain, row_of(inputs, 1), generator)
    expected = logits_of(plain, inputs)
    model = shard(copy.deepcopy(plain))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert torch.equal(logits_of(model, inputs), expected)
    base = logits_of(LLAVA.build(), inputs)
    store(model, row_of(inputs, 2), generator)
    assert lookup(model, row_of(inputs, 2)).fired
    expected = logits_of(model, inputs)
    assert not torch.equal(expected[2], base[2])
    assert torch.equal(expected[0], base[0])
    model.save_pretrained(tmp_path, state_dict=full_state(model))
    loaded = PeftModel.from_pretrained(LLAVA.build(), tmp_path)
    assert torch.equal(logits_of(loaded, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), base)


def test_fsdp2_trains(one_process, edited, build):
    model, questions, rows = edited
    sharded = shard(copy.deepcopy(model))
    batch = {name: value[None] for name, value in rows[0].items()}
    for each in (model, sharded):
        each.train()
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        each(**batch).loss.backward()
        optimizer.step()
        each.eval()
    ours, theirs = trained_parts(model), full_state(sharded)
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-5, atol=1e-6), name
    ours, theirs = logits_of(model, questions[1]), logits_of(sharded, questions[1])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert edit_layers(sharded)
