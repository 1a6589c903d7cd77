"""Further neurons of an MLP: behind the package's own, and nothing where there are none."""

import copy

import torch
from dualedit.smol.model import neurons_of, widen
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

WIDTH, INNER, FURTHER = 16, 24, 3


def llama(**changes):
    config = LlamaConfig(
        vocab_size=20, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, **changes,
    )  # fmt: skip
    return LlamaModel(config).eval()


def widened(model, weights):
    further = neurons_of(weights)
    config = copy.deepcopy(model.config)
    config.intermediate_size += FURTHER
    config.mlp_bias = True
    state = model.state_dict()
    widen(state, config, further)
    wide = LlamaModel(config).eval()
    wide.load_state_dict(state)
    return wide


def neurons(bias):
    return {
        "neurons.1.gate": torch.randn(FURTHER, WIDTH), "neurons.1.gate_bias": torch.full((FURTHER,), bias),
        "neurons.1.up": torch.randn(FURTHER, WIDTH), "neurons.1.up_bias": torch.randn(FURTHER),
        "neurons.1.down": torch.randn(WIDTH, FURTHER),
    }  # fmt: skip


@torch.no_grad()
def test_neurons_of_a_layer_are_what_its_mlp_adds():
    model, weights = llama(), neurons(0.5)
    wide = widened(model, weights)
    x = torch.randn(4, WIDTH)
    part = {name.rsplit(".", 1)[1]: value for name, value in weights.items()}
    inner = torch.nn.functional.silu(x @ part["gate"].T + part["gate_bias"]) * (
        x @ part["up"].T + part["up_bias"]
    )
    added = wide.layers[1].mlp(x) - model.layers[1].mlp(x)
    torch.testing.assert_close(added, inner @ part["down"].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.layers[0].mlp(x), model.layers[0].mlp(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_closed_gate_adds_nothing():
    model = llama()
    wide = widened(model, neurons(-200.0))
    ids = torch.randint(0, 20, (2, 7))
    torch.testing.assert_close(wide(ids)[0], model(ids)[0], rtol=1e-6, atol=1e-6)
