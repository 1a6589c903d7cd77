"""What is registered beside the table's architectures: found all the same, or refused with the reason."""

import pytest
import torch
import transformers
from dualedit import inject_balancedit, inject_dualedit
from dualedit.models.architectures import find_decoder_layers, resolve_layer
from packaging.version import Version
from transformers import AutoConfig

from .builders import REFUSED
from .parts import REGISTERED


def on_meta(name, **settings):
    """A model of the type's default config, without weights."""
    config = AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        return getattr(transformers, REGISTERED[name])._from_config(config)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name, record_property):
    kind, _, text = name.partition("+")
    if kind not in REGISTERED:
        pytest.skip(f"{kind} is not in this version of transformers")
    try:
        model = on_meta(kind, **({"text_config": {"model_type": text}} if text else {}))
    except Exception as error:  # an older transformers alone: nothing of ours has run
        if Version(transformers.__version__) >= Version("5.23"):
            raise
        pytest.skip(f"its default config does not build: {type(error).__name__}: {str(error).strip()[:100]}")
    reason, only_dualedit = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as caught:
        inject_dualedit(model, text_layer=0, vis_layer=None)
    if not only_dualedit:
        with pytest.raises(ValueError, match=reason):
            inject_balancedit(model, layer="layers.0.mlp.up_proj")
    assert not hasattr(model, "peft_config") and "generate" not in vars(model)
    record_property(f"refused:{name}", str(caught.value))


@pytest.mark.tier2
@pytest.mark.parametrize("name", REGISTERED)
def test_layers_of_every_registered_type(name):
    """The default config of every registered type, full depth, without weights."""
    try:
        model = on_meta(name)
    except Exception as error:  # transformers alone: nothing of ours has run
        pytest.skip(f"its default config does not build: {type(error).__name__}: {str(error).strip()[:100]}")
    if model.config.is_encoder_decoder or name in REFUSED and not REFUSED[name][1]:
        with pytest.raises(ValueError):
            find_decoder_layers(model)
        return
    path, layers = find_decoder_layers(model)
    stack = path.rpartition(".")[2]
    assert len(layers) >= 2
    if name not in REFUSED:
        last = len(layers) - 1
        for given in (last, -1, f"{path}.{last}", f"{stack}.{last}", rf".*\.{stack}\.{last}"):
            assert resolve_layer(model, given) == f"{path}.{last}", given
