"""What `dualedit train` is made of: checkpoints, random generators, metrics, launch files."""

import sys

import pytest
import torch
from dualedit import load_edits
from dualedit.cli import main
from dualedit.training import Recipe, checkpoint, read_recipe
from dualedit.training.checkpoint import read_checkpoint
from dualedit.training.metrics import MetricsFile, read_metrics
from dualedit.training.recipe import recipe_from


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    made = checkpoint.Checkpoint(3, {"w": torch.ones(2)}, {}, [checkpoint.random_state()], None, {}, "0:", {})
    checkpoint.write_checkpoint(tmp_path, made, 2)

    def cut(content, opened):
        opened.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write_checkpoint(tmp_path, made, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000003.pt"]
    (tmp_path / ".writing-1").write_bytes(b"of a killed run")
    checkpoint.write_checkpoint(tmp_path, made, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000003.pt"]
    assert torch.equal(read_checkpoint(tmp_path / "step-00000003.pt").weights["w"], torch.ones(2))


def test_random_generators_go_on_where_they_were():
    import random

    state = checkpoint.random_state()
    drawn = random.random(), float(torch.rand(()))
    checkpoint.set_random_state(state)
    assert (random.random(), float(torch.rand(()))) == drawn


def test_metrics_behind_the_checkpoint_are_taken_out(tmp_path):
    book = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        book.write(step, {"loss": float(step)})
    with book.file.open("a") as opened:
        opened.write('{"step": 4, "lo')
    MetricsFile(tmp_path, 2).write(3, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 9]


def test_tensorboard_gets_the_same_figures(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step = folder, purge_step

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    book = MetricsFile(tmp_path, tensorboard=True)
    book.write(5, {"loss": 0.5})
    book.close()
    assert written == [("loss", 0.5, 5), "closed"] and book.writer.purge_step is None


def test_launch_files_are_accelerates_own(tmp_path, capsys):
    from accelerate.commands.config.config_args import load_config_from_file

    assert main(["train", "--write-configs", str(tmp_path)]) == 0
    assert load_config_from_file(str(tmp_path / "ddp.yaml")).distributed_type == "MULTI_GPU"
    sharded = load_config_from_file(str(tmp_path / "fsdp.yaml"))
    assert sharded.distributed_type == "FSDP" and sharded.fsdp_config["fsdp_version"] == 2
    assert load_config_from_file(str(tmp_path / "cpu.yaml")).use_cpu
    assert read_recipe(tmp_path / "train.yaml")[0] == Recipe()
    assert main(["train", "--write-configs", str(tmp_path)]) == 2
    assert "nothing is written over" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_model_by_name(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--model", "embedded", "--limit", "6", "--held-out-edits", "2", "--steps", "2",
                 "--out", str(out)]) == 0  # fmt: skip
    saved, _ = read_recipe(out / "recipe.yaml")
    assert saved.data == "embedded" and saved.mid_dim < 1024  # sizes that fit its eight narrow layers
    from dualedit.toy.model import load_embedded

    load_edits(load_embedded()[0], out)


def test_unknown_names_from_code():
    with pytest.raises(ValueError, match="nearest is 'batch_size'"):
        recipe_from({"batchsize": 4}, "here")
