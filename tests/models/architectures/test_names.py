"""Names of layers: which are understood, and what is said about those that are not."""

import pytest
from dualedit import inject_dualedit
from dualedit.models.architectures import resolve_layer, resolve_linear

from .builders import ARCHITECTURES


@pytest.fixture(scope="module")
def llava():
    return ARCHITECTURES["llava"].build(0)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.2",
        "language_model.model.layers.2",  # transformers v4
        "model.layers.2",  # Qwen2-VL in v4, a plain language model
        "base_model.model.model.language_model.layers.2",  # from a PeftModel's named_modules()
        "model.language_model.layers.2.base_layer",
        "language_model.layers.2",
        "layers.2",
        "2",
        r"model\.lang.*\.2",
    ],
)
def test_names_of_one_layer(llava, name):
    assert resolve_layer(llava, name) == "model.language_model.layers.2"


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.2.mlp.up_proj",
        "language_model.model.layers.2.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
        "layers.2.mlp.up_proj",
        "2.mlp.up_proj",
        r".*layers\.2\..*up_proj",
    ],
)
def test_names_of_one_linear_layer(llava, name):
    assert resolve_linear(llava, name) == "model.language_model.layers.2.mlp.up_proj"


def test_names_in_an_edited_model():
    model = inject_dualedit(ARCHITECTURES["llava"].build(0), text_layer=1, vis_layer=2, mid_dim=16)
    assert resolve_layer(model.get_base_model(), "layers.2") == "model.language_model.layers.2"
    full = resolve_linear(model.get_base_model(), "layers.2.mlp.up_proj")
    assert full == "model.language_model.layers.2.base_layer.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.7", ["no such module", "model.language_model.layers.0 to model.language_model.layers.3"]),
        ("model.vision_tower.encoder.layers.0", ["no such module"]),
        (r".*layers\.[01]", ["is ambiguous", "model.language_model.layers.0, model.language_model.layers.1"]),
        ("layers.(", ["no such module"]),
    ],
)
def test_layers_that_are_not_meant_by_anything(llava, name, words):
    with pytest.raises(ValueError) as caught:
        resolve_layer(llava, name, "vis_layer")
    for word in [f"vis_layer={name!r}", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("up_proj", ["is ambiguous", "layers.0.mlp.up_proj, ", "Pass one full name"]),
        ("layers.2.mlp.upproj", ["no such module", "model.language_model.layers.2.mlp.up_proj"]),
        ("lm_head", ["lm_head is not part of a decoder layer", "for instance model.language_model.layers."]),
        ("multi_modal_projector.linear_1", ["model.multi_modal_projector.linear_1 is not part of a decoder"]),
    ],
)
def test_linear_layers_that_are_not_meant_by_anything(llava, name, words):
    with pytest.raises(ValueError) as caught:
        resolve_linear(llava, name)
    for word in [f"layer={name!r}", *words]:
        assert word in str(caught.value)
