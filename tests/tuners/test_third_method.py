"""A method from outside the package edits, saves, loads and is evaluated without a change of the library."""

import ast
from pathlib import Path

import pytest
import torch
from dualedit import Editor, inject_dualedit, load_edits, save_edits
from dualedit.evaluation import EditorMethod, Plan, evaluate
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.tuners import EditMethod, active_adapter, register_edit_method
from peft import PeftModel, get_peft_model
from steering_method import SteeringConfig, SteeringMethod

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "dualedit"


@pytest.fixture
def samples():
    return edit_samples(World(0), "train", 3, seed=5)


def test_it_edits_saves_and_loads(samples, tmp_path):
    base, processor = load_embedded()
    model = get_peft_model(base, SteeringConfig(layer=0))
    editor = Editor(model, processor)
    request, other = samples[0].request, samples[1].request
    before = editor.answer(other.image, other.prompt)
    told = editor.edit(request.image, request.prompt, request.target)
    assert editor.answer(request.image, request.prompt) == request.target
    assert editor.answer(other.image, other.prompt) == before
    assert editor.edits == [told] and told.probability > 0.5
    save_edits(model, tmp_path)
    assert "Steering vectors" in (tmp_path / "README.md").read_text()
    for load in (load_edits, PeftModel.from_pretrained):
        again = Editor(load(load_embedded()[0], str(tmp_path)), processor)
        assert again.answer(request.image, request.prompt) == request.target
        assert [edit.id for edit in again.edits] == [told.id]
    editor.undo()
    assert editor.answer(request.image, request.prompt) != request.target
    inputs = editor.prompter.inputs([(request.image, request.prompt)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, load_embedded()[0](**inputs).logits)


def test_it_is_evaluated_and_stands_beside_the_library_s_own(samples):
    base, processor = load_embedded()
    model = get_peft_model(base, SteeringConfig(layer=0))
    method = EditorMethod(Editor(model, processor), "steering")
    [result] = evaluate(method, samples, Plan(), progress=False)
    assert result.row.metrics["rel"] == 100
    both = inject_dualedit(model, text_layer=2, vis_layer=3, mid_dim=16, num_heads=2, adapter_name="more")
    with pytest.raises(ValueError, match="Several edit adapters are active"):
        active_adapter(both)


def test_a_name_that_peft_knows_is_refused():
    class Lora(SteeringMethod):
        name = "lora"

    with pytest.raises(ValueError, match="method.name='lora'.*another"):
        register_edit_method(Lora())


def asked_which_method(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines of `isinstance` calls that name a class of a method."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & names
    ]


def test_nothing_outside_a_method_s_folder_asks_which_method_it_is():
    names = {
        f"{m}{part}" for m in ("DualEdit", "BalancEdit") for part in ("Config", "Layer", "Model", "Method")
    }
    assert asked_which_method(ast.parse("isinstance(x, (int, DualEditLayer))"), names)
    own = {PACKAGE / "tuners" / folder for folder in ("dualedit", "balancedit")}
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in sorted(PACKAGE.rglob("*.py"))
        if not own & set(file.parents)
        and (lines := asked_which_method(ast.parse(file.read_text(encoding="utf-8")), names))
    }
    assert found == {}


def test_a_method_is_abstract_until_it_says_everything():
    with pytest.raises(TypeError, match="abstract"):
        EditMethod()
