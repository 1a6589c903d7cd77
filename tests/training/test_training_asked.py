"""Above the edit a training step's backward pass goes through the positions that the edit writes to."""

import pytest
import torch
from dualedit.training.asked import _Asked, asked_at, left_by
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

LOWEST = torch.finfo(torch.float32).min


class Copying(LlamaDecoderLayer):
    """One whose projections read something else than the norm's output itself: a mean over positions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.self_attn.register_forward_pre_hook(
            lambda m, a, k: (a, {**k, "hidden_states": k["hidden_states"].cumsum(1)}), with_kwargs=True
        )


def problem(generator, dtype, kind=LlamaDecoderLayer):
    """A frozen layer, states [3, 9, 16], what it is called with, and the places that are written to."""
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager", attention_bias=True,
    )  # fmt: skip
    states = torch.randn(3, 9, 16, generator=generator).to(dtype)
    positions = torch.arange(9)[None]
    closed = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1)
    kwargs = {
        "attention_mask": torch.zeros(1, 1, 9, 9).masked_fill(closed, LOWEST).to(dtype),
        "position_embeddings": LlamaRotaryEmbedding(config)(states, positions),
    }
    at = torch.zeros(3, 9, dtype=torch.bool)
    at[0, 1] = at[1, 4] = at[1, 6] = at[2, 0] = True
    return kind(config, 0).to(dtype).eval().requires_grad_(False), states, kwargs, at


def gradients(layer, states, kwargs, at, upstream, cut, by_name=False):
    x = states.clone().requires_grad_()
    with asked_at(layer, at if cut else torch.ones_like(at)) as count:
        assert count == (7 if cut else 0)
        out = layer(**{"hidden_states": x}, **kwargs) if by_name else layer(x, **kwargs)
    assert all("forward" not in module.__dict__ for module in layer.modules())
    return out.detach(), torch.autograd.grad(out, x, upstream)[0]


@pytest.mark.parametrize("by_name", [True, False])
def test_gradients_are_those_of_the_whole_layer_where_asked(by_name, generator, monkeypatch):
    layer, states, kwargs, at = problem(generator, torch.float64)
    taken, apply = [], _Asked.apply
    monkeypatch.setattr(_Asked, "apply", lambda *args: taken.append(len(args[3])) or apply(*args))
    upstream = torch.randn(3, 9, 16, generator=generator).double()
    out, found = gradients(layer, states, kwargs, at, upstream, True, by_name)
    same, wanted = gradients(layer, states, kwargs, at, upstream, False)
    assert torch.equal(out, same)
    torch.testing.assert_close(found[at], wanted[at], rtol=1e-9, atol=1e-12)
    assert taken == [4, 4, 4]  # queries, keys and values; the others read what attention has mixed
    assert not torch.allclose(found[~at], wanted[~at])  # it has left something out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_to_the_truth_as_the_whole_layer(dtype, generator):
    layer, states, kwargs, at = problem(generator, dtype)
    upstream = torch.randn(3, 9, 16, generator=generator).to(dtype)
    found, plain = (gradients(layer, states, kwargs, at, upstream, cut)[1][at] for cut in (True, False))
    exact = {
        "attention_mask": kwargs["attention_mask"].double(),
        "position_embeddings": tuple(t.double() for t in kwargs["position_embeddings"]),
    }
    true = gradients(layer.double(), states.double(), exact, at, upstream.double(), False)[1][at]
    errors = [float((each.double() - true).norm() / true.norm()) for each in (found, plain)]
    assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_where_something_else_is_read_nothing_is_left_out(generator):
    layer, states, kwargs, at = problem(generator, torch.float64, Copying)
    upstream = torch.randn(3, 9, 16, generator=generator).double()
    found, wanted = (gradients(layer, states, kwargs, at, upstream, cut)[1] for cut in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, Copying])
def test_products_of_a_run_without_the_edit_are_taken_from_there(kind, generator):
    layer, states, kwargs, at = problem(generator, torch.float64, kind)
    upstream = torch.randn(3, 9, 16, generator=generator).double()
    with torch.no_grad(), left_by(layer, at) as left:
        layer(states, **kwargs)
    attention = layer.self_attn
    own = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert list(left) == (own if kind is LlamaDecoderLayer else [])
    states[at] += torch.randn(4, 16, generator=generator).double()
    x = states.clone().requires_grad_()
    asks, multiply = [], torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch, asked_at(layer, at, left):
        patch.setattr(
            torch.nn.functional,
            "linear",
            lambda x, *more: asks.append(x.shape[:-1].numel()) or multiply(x, *more),
        )
        out = layer(x, **kwargs)
    (found,) = torch.autograd.grad(out, x, upstream)
    wanted, gradient = gradients(layer, states, kwargs, at, upstream, False)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[at], gradient[at], rtol=1e-9, atol=1e-12)
    assert asks[:3] == ([4, 4, 4] if kind is LlamaDecoderLayer else [27, 27, 27]) and asks[3:] == [27] * 4
    # What is not asked for is taken as it was left.
    if kind is LlamaDecoderLayer:
        left[attention.v_proj].zero_()
        with asked_at(layer, at, left):
            assert not torch.allclose(layer(x, **kwargs), wanted)


def test_other_layers_are_left_alone(generator):
    layer, states, kwargs, at = problem(generator, torch.float32)
    layer.self_attn.q_proj.weight.requires_grad_()
    layer.self_attn.k_proj._hf_hook = object()
    layer.self_attn.v_proj.forward = own = layer.self_attn.v_proj.forward
    with pytest.raises(KeyError), asked_at(layer, at) as count:
        assert count == 5 and layer.self_attn.v_proj.forward is not own
        raise KeyError
    assert layer.self_attn.v_proj.__dict__["forward"] is own
    with asked_at(nn.Sequential(nn.Linear(16, 16).requires_grad_(False)), at) as count:
        assert count == 0  # no norm that could tell
