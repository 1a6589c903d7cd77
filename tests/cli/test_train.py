"""`dualedit train`: what it writes, how it goes on after a stop, and what it says when something is wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from dataset_files import EVQA, FILES
from dualedit import Editor, load_edits
from dualedit.cli import main
from dualedit.training import Recipe, read_recipe
from dualedit.training.checkpoint import checkpoints, read_checkpoint
from dualedit.training.data import fingerprint_of, load_edits_to_train
from dualedit.training.metrics import read_metrics
from dualedit.training.questions import untrained_terms
from dualedit.training.recipe import learning_rate_at, recipe_text
from dualedit.training.step import TrainingStep
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import LLAVA, random_image, tiny_processor
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may

ROOT = Path(__file__).parents[2]
SMALL = [
    "--text-layer",
    "1",
    "--vis-layer",
    "2",
    "--mid-dim",
    "16",
    "--num-heads",
    "2",
    "--learning-rate",
    "0.01",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny LLaVA in the hub's layout."""
    folder = tmp_path_factory.mktemp("model")
    LLAVA.build().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 12 facts of the user's own, with pictures."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(12):
        for kind in "abc":
            random_image(generator).save(folder / f"{number}{kind}.png")
        rows.append(
            {
                "image": f"{number}a.png", "prompt": ["what brand is this ?", "who made it ?"][number % 2],
                "target": ["lenovo", "acer", "red apple"][number % 3],
                "rephrases": ["question : what is it ?"],
                "other_images": [f"{number}b.png"],
                "keep": [
                    {"image": f"{number}c.png", "prompt": "what color is it ?", "answer": "blue"},
                    {"prompt": "who is the dog ?", "answer": "cat"},
                    {"image": f"{number}a.png", "prompt": "what color is it ?", "answer": "green"},
                ],
            }
        )  # fmt: skip
    file = folder / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def train(model, data, capsys):
    """Run the command on the tiny model; gives the exit code and what was said on either stream."""

    def run(out, *options, **more):
        code = main(
            ["train", "--model", str(model), "--data", str(data), "--out", str(out), *SMALL, *options]
        )
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_leaves_adapters_that_every_way_loads(train, model, tmp_path):
    out = tmp_path / "adapters"
    code, said = train(out, "--steps", "9", "--checkpoint-every", "3", "--evaluate-every", "3", "--log-every",
                       "2", "--hard-locality", "0.5", "--held-out-edits", "1")  # fmt: skip
    assert code == 0 and "adapters: " in said and "11 edits to train on, 1 held out" in said
    assert [file.name for file in checkpoints(out / "checkpoints")] == [
        "step-00000006.pt",
        "step-00000009.pt",
    ]
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 9]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(held_out) == [3, 6, 9]
    best = min(held_out, key=held_out.get)
    assert f"at step {best}" in said
    last = read_checkpoint(checkpoints(out / "checkpoints")[-1])
    assert last.best == (best, pytest.approx(held_out[best]))
    assert (out / "last").is_dir() == (best != 9)
    base = AutoModelForImageTextToText.from_pretrained(model).eval()
    loaded = PeftModel.from_pretrained(base, out)
    assert loaded.peft_config["default"].text_layer == 1 and loaded.peft_config["default"].mid_dim == 16
    editor = Editor(
        load_edits(AutoModelForImageTextToText.from_pretrained(model).eval(), out), tiny_processor()
    )
    image = random_image(torch.Generator().manual_seed(1))
    editor.edit(image, "what brand is this ?", "acer", keep_failed=True)
    assert len(editor.edits) == 1


def test_training_teaches(train, tmp_path):
    few = ("--limit", "4", "--held-out-edits", "0")
    code, _ = train(tmp_path / "out", "--steps", "30", "--log-every", "5", *few)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert code == 0 and lines[-1]["reliability"] < 0.75 * lines[0]["reliability"]
    assert lines[-1]["edits_per_second"] > 0 and lines[-1]["learning_rate"] == 0.01


def stopping(out, step):
    """Press Ctrl-C once a run has written the checkpoint of a step."""

    def watch():
        while not (out / "checkpoints" / f"step-{step:08d}.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_stopped_run_goes_on_to_the_same_end(train, tmp_path):
    """Weights, optimizer, order of the edits, best adapters and metrics: bit for bit as without the stop."""
    options = ("--steps", "30", "--checkpoint-every", "5", "--evaluate-every", "10", "--log-every", "5",
               "--schedule", "cosine", "--warmup", "3", "--held-out-edits", "1",
               "--keep-checkpoints", "99")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *options)[0] == 0
    watcher = stopping(cut, 10)
    with pytest.raises(SystemExit) as left:
        train(cut, *options)
    watcher.join()
    assert left.value.code == 130
    stopped = read_checkpoint(checkpoints(cut / "checkpoints")[-1])
    assert 10 <= stopped.step < 30
    code, said = train(cut, "--resume")  # the other options come from the run's own recipe.yaml
    assert code == 0 and f"Resumed at step {stopped.step}" in said
    ends = [read_checkpoint(checkpoints(run / "checkpoints")[-1]) for run in (whole, cut)]
    assert ends[0].step == ends[1].step == 30 and ends[0].best == ends[1].best
    assert same(ends[0].weights, ends[1].weights)
    assert all(same(ends[0].optimizer[name], ends[1].optimizer[name]) for name in ends[0].optimizer)
    assert same(weights(whole), weights(cut))
    steps = [[line["step"] for line in read_metrics(run / "metrics.jsonl")] for run in (whole, cut)]
    assert steps[0] == steps[1]


def test_stopping_says_how_to_go_on(train, tmp_path, capsys):
    out = tmp_path / "out"
    stopping(out, 2)
    with pytest.raises(SystemExit):
        train(out, "--steps", "5000", "--checkpoint-every", "2")
    assert f"dualedit train --out {out} --resume" in capsys.readouterr().out


def command(model, data, out, *options):
    named = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return [sys.executable, "-m", "dualedit.cli", "train", *named, *SMALL, *options]


def environment():
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(model, data, train, tmp_path):
    """SIGKILL at any moment, here in the middle: the newest whole checkpoint is enough."""
    options = ("--steps", "80", "--checkpoint-every", "5", "--held-out-edits", "0", "--limit", "6")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(model, data, killed, *options), env=environment(), stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 300
    while not checkpoints(killed / "checkpoints") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    stands = read_checkpoint(checkpoints(killed / "checkpoints")[-1]).step
    assert 0 < stands < 80
    assert train(killed, *options, "--resume")[0] == 0
    assert train(tmp_path / "whole", *options)[0] == 0
    assert same(weights(killed), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "fsdp"])
def test_two_processes_give_the_losses_of_one(name, model, data, train, tmp_path):
    """accelerate launch with gloo on two CPUs, the shipped configurations, the same batch of four edits."""
    config, call = tmp_path / "configs" / f"{name}.yaml", command(model, data, tmp_path / "two")
    assert main(["train", "--write-configs", str(config.parent)]) == 0
    module = call[1:3]
    if name == "fsdp":
        config.write_text(config.read_text().replace("use_cpu: false", "use_cpu: true"))
        module = [str(ROOT / "tests" / "support" / "sharded_on_cpu.py")]
    options = ("--steps", "6", "--log-every", "1", "--evaluate-every", "3", "--held-out-edits", "1")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    subprocess.run(
        [call[0], *launch, *module, *call[3:], *options], env=environment(), check=True, timeout=280
    )
    assert train(tmp_path / "one", *options)[0] == 0
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two"))
    names = {name for line in one for name in line} - {"edits_per_second"}
    assert len(one) == len(two) == 8 and {"image_locality", "held_out_loss", "gradient_norm"} <= names
    for first, second in zip(one, two, strict=True):
        assert {n: first[n] for n in names & first.keys()} == pytest.approx(
            {n: second[n] for n in names & second.keys()}, rel=1e-3, abs=1e-6
        )
    # A checkpoint is whole, however many processes held its pieces.
    first, second = (read_checkpoint(checkpoints(tmp_path / n / "checkpoints")[-1]) for n in ("one", "two"))
    assert len(second.random) == 2 and first.weights.keys() == second.weights.keys()
    for key, weight in first.weights.items():
        assert second.weights[key].shape == weight.shape
        # A bias of all keys shifts a question's scores alike: its gradient is rounding, which Adam scales.
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(second.weights[key], weight, rtol=1e-3, atol=1e-4)


def test_parts_of_a_batch_change_nothing(train, tmp_path):
    for out, more in (("whole", ()), ("parts", ("--accumulate", "2")), ("less", ("--recompute",))):
        assert train(tmp_path / out, "--steps", "4", "--log-every", "1", *more)[0] == 0
    whole, parts, less = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts", "less"))

    def losses(lines):
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(less) == pytest.approx(losses(whole), rel=1e-6)


def test_bf16_trains_fp32_adapters(train, tmp_path):
    assert train(tmp_path / "out", "--steps", "3", "--precision", "bf16")[0] == 0
    assert {tensor.dtype for name, tensor in weights(tmp_path / "out").items() if "adapter" in name} == {
        torch.float32
    }


def test_a_dry_run_measures_and_writes_nothing(train, tmp_path):
    code, said = train(tmp_path / "out", "--dry-run", "--steps", "1000")
    assert code == 0 and not (tmp_path / "out").exists()
    for word in ("million trained", "s a step", "for 1000 steps", "GiB of CPU memory", "2 checkpoints of",
                 "keep_gib="):  # fmt: skip
        assert word in said


# ---------------------------------------------------------------------- settings


def test_a_recipe_file_has_every_setting(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(recipe_text(Recipe()))
    recipe, named = read_recipe(file)
    assert recipe == Recipe() and named == set(vars(recipe))
    changed = Recipe(
        data="a: b#.json", text_layer=None, vis_layer="layers.3", grad_clip=1.5, tensorboard=True
    )
    file.write_text(recipe_text(changed))
    assert read_recipe(file)[0] == changed


def test_the_papers_settings_are_the_defaults():
    recipe = Recipe()
    assert (recipe.text_layer, recipe.vis_layer, recipe.mid_dim, recipe.num_heads) == (16, 19, 1024, 8)
    assert (recipe.learning_rate, recipe.batch_size, recipe.steps) == (1e-4, 4, 50_000)
    assert set(recipe.weights().values()) == {1.0, 0.0} and recipe.hard_locality == 0


def test_options_win_over_the_file(train, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("steps: 3\nlearning_rate: 1e-3\nlog_every: 1\n")
    assert train(tmp_path / "out", "--config", str(file), "--learning-rate", "2e-3")[0] == 0
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len([line for line in lines if "loss" in line]) == 3 and lines[0]["learning_rate"] == 2e-3


def test_held_out_edits_come_from_their_file_or_from_the_end(data):
    notes = []
    whole = load_edits_to_train(Recipe(data=str(data), held_out_edits=0))
    assert [len(part) for part in whole] == [12, 0]
    samples, held_out = load_edits_to_train(Recipe(data=str(data)))
    assert len(samples) == 11 and [s.request for s in held_out] == [whole[0][11].request]
    samples, held_out = load_edits_to_train(Recipe(data=str(data), held_out_edits=2))
    assert [len(samples), len(held_out)] == [10, 2]  # what is asked for, though it is more than a tenth
    with pytest.raises(ValueError, match="held_out_edits=12: there are 12 edits, and none would be left"):
        load_edits_to_train(Recipe(data=str(data), held_out_edits=12))
    with pytest.raises(ValueError, match="held_out_edits=13: .* holds 12"):
        load_edits_to_train(Recipe(data=str(data), held_out=str(data), held_out_edits=13))
    samples, held_out = load_edits_to_train(Recipe(data=str(data), held_out=str(data), held_out_edits=5))
    assert len(samples) == 12 and len(held_out) == 5
    evqa = Recipe(data=str(FILES / "evqa/vqa_train.json"), image_root=os.pathsep.join(map(str, EVQA)))
    samples, _ = load_edits_to_train(evqa, notes.append)
    assert len(samples) == 2 and not notes and not untrained_terms(samples, evqa.weights())
    with pytest.raises(ValueError, match="name the file"):
        load_edits_to_train(Recipe())


def test_learning_rate_schedules():
    recipe = Recipe(steps=100, warmup=10, schedule="linear", learning_rate=1.0)
    assert learning_rate_at(recipe, 0) == pytest.approx(0.1) and learning_rate_at(recipe, 10) == 1.0
    assert learning_rate_at(recipe, 55) == pytest.approx(0.5)
    cosine = Recipe(steps=100, schedule="cosine", learning_rate=1.0)
    assert learning_rate_at(cosine, 50) == pytest.approx(0.5) and learning_rate_at(
        cosine, 100
    ) == pytest.approx(0)
    assert learning_rate_at(Recipe(), 49_999) == 1e-4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1", "the nearest is 'learning_rate'"),
        ("vis-layers: 3", "the nearest is 'vis_layer'"),
        ("steps: many", "--steps 'many' should be a whole number"),
        ("steps: 0", "--steps 0: pass a whole number from 1 up"),
        ("skip_bad: 1", "--skip-bad 1 should be true or false"),
        ("schedule: step", "--schedule 'step': choose one of"),
        ("batch_size: null", "--batch-size (not given) should be a whole number"),
        ("- steps", "holds a list"),
        ("steps: [", "is no YAML"),
    ],
)
def test_bad_recipe_files(text, says, train, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(text)
    code, said = train(tmp_path / "out", "--config", str(file))
    assert code == 2 and says in said and "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-size", "5", "--accumulate", "2"], "--batch-size 5 cannot be divided"),
        (["--text-layer", "9"], "--text-layer 9: model.language_model.layers has 4 layers"),
        (["--learning-rate", "fast"], "--learning-rate 'fast' should be a number"),
        (["--data", "nothing.json"], "nothing.json"),
        (["--config", "nothing.yaml"], "no such file"),
        (["--num-heads", "3"], "pass a positive divisor of --mid-dim 16"),
        (["--model", "nowhere"], "is no folder"),
    ],
)
def test_bad_options_fit_on_a_line(options, says, train, tmp_path):
    code, said = train(tmp_path / "out", "--steps", "1", *options)
    assert code == 2 and says in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_over(train, tmp_path):
    out = tmp_path / "out"
    assert train(out, "--steps", "2")[0] == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, said = train(out, "--steps", "2")
    assert code == 2 and "pass --resume to go on" in said
    code, said = train(out, "--steps", "4", "--resume", "--learning-rate", "0.5")
    assert code == 2 and "learning_rate was 0.01" in said
    code, said = train(out, "--steps", "4", "--resume", "--limit", "5")
    assert code == 2 and "limit was None" in said
    file = checkpoints(out / "checkpoints")[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, said = train(out, "--steps", "4", "--resume")
    assert code == 2 and "is damaged" in said and "delete it" in said
    file.write_bytes(whole)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert train(out, "--steps", "4", "--resume")[0] == 0  # a longer run is another matter


def test_other_data_are_not_gone_on_with(train, data, tmp_path):
    out, other = tmp_path / "out", data.with_name("other.jsonl")
    assert train(out, "--steps", "2", "--data", str(other.with_name("facts.jsonl")))[0] == 0
    kept = data.read_text()
    try:
        data.write_text(kept.replace('"lenovo"', '"dell"'))
        code, said = train(out, "--steps", "4", "--resume")
    finally:
        data.write_text(kept)
    assert code == 2 and "The training edits are not those" in said


def test_other_pictures_are_not_gone_on_with(train, data, tmp_path):
    """A file of the same name with other content: questions and answers alone do not show it."""
    out, picture = tmp_path / "out", data.with_name("3b.png")
    assert train(out, "--steps", "2")[0] == 0
    kept = picture.read_bytes()
    try:
        picture.write_bytes(data.with_name("4b.png").read_bytes())
        code, said = train(out, "--steps", "4", "--resume")
    finally:
        picture.write_bytes(kept)
    assert code == 2 and "The training edits are not those" in said
    assert train(out, "--steps", "4", "--resume")[0] == 0


def test_a_fingerprint_sees_every_question_and_picture(data):
    samples = list(load_edits_to_train(Recipe(data=str(data), held_out_edits=0))[0])
    found = {fingerprint_of(samples), fingerprint_of(samples[::-1]), fingerprint_of(samples[1:])}
    for name in ("generality", "locality"):
        for kind in getattr(samples[0], name):
            fewer = {**getattr(samples[0], name), kind: []}
            found.add(fingerprint_of([dataclasses.replace(samples[0], **{name: fewer}), *samples[1:]]))
    assert len(found) == 3 + len(samples[0].generality) + len(samples[0].locality)
    assert fingerprint_of(samples) in found


def test_adapters_to_begin_with(train, tmp_path):
    """A second run goes on from the first one's adapters, with an optimiser of its own."""
    first, second, fresh = (tmp_path / name for name in ("first", "second", "fresh"))
    one = ("--steps", "1", "--log-every", "1", "--held-out-edits", "0")
    assert train(first, "--steps", "10", "--held-out-edits", "0")[0] == 0
    assert train(second, *one, "--adapters", str(first))[0] == 0
    assert train(fresh, *one)[0] == 0
    loss = {out: read_metrics(out / "metrics.jsonl")[0]["loss"] for out in (second, fresh)}
    assert loss[second] < 0.9 * loss[fresh]
    code, said = train(tmp_path / "other", *one, "--adapters", str(first), "--mid-dim", "32")
    assert code == 2 and "--mid-dim 32: the adapters in" in said


def test_kept_frozen_runs_change_nothing(train, tmp_path):
    """With room for all, for none, and for some: the same bits; and the losses of rows that run together."""
    options = ("--steps", "6", "--log-every", "1", "--held-out-edits", "0", "--limit", "6")
    for out, gib in (("all", "1"), ("none", "1e-9"), ("some", "1e-5"), ("together", "0")):
        assert train(tmp_path / out, *options, "--keep-gib", gib)[0] == 0
    assert same(weights(tmp_path / "all"), weights(tmp_path / "none"))
    assert same(weights(tmp_path / "all"), weights(tmp_path / "some"))
    rows, together = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("all", "together"))
    assert [line["loss"] for line in rows] == pytest.approx([line["loss"] for line in together], rel=1e-4)
    code, _ = train(tmp_path / "all", *options, "--steps", "8", "--keep-gib", "2", "--resume")
    assert code == 0  # how many runs are kept is free
    code, said = train(tmp_path / "all", *options, "--steps", "8", "--keep-gib", "0", "--resume")
    assert code == 2 and "keep_gib was 2.0" in said


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_out_of_memory_says_what_to_lower(error, train, tmp_path, monkeypatch):
    def fail(self, batch):
        raise error

    monkeypatch.setattr(TrainingStep, "forward", fail)
    code, said = train(tmp_path / "out", "--steps", "2", "--precision", "fp32")
    assert code == 2 and "memory left" in said
    for remedy in ("--precision bf16", "--accumulate 2", "--recompute true", "mid_dim below 16"):
        assert remedy in said


def test_other_errors_keep_their_traceback(train, tmp_path, monkeypatch):
    def fail(self, batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TrainingStep, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "out", "--steps", "2")


def test_a_gradient_that_is_not_finite_stops_the_run(train, tmp_path, monkeypatch):
    real = TrainingStep.forward
    monkeypatch.setattr(TrainingStep, "forward", lambda self, batch: real(self, batch) * float("nan"))
    code, said = train(tmp_path / "out", "--steps", "2")
    assert code == 2 and "Step 1: the gradient is not finite. Lower --learning-rate 0.01" in said
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_missing_tensorboard_is_named_before_training(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, said = train(tmp_path / "out", "--steps", "2", "--tensorboard")
    assert code == 2 and "pip install tensorboard" in said
