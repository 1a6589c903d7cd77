"""What makes a training step quick changes its rounding at most: attention by head, a narrow last layer."""

from types import SimpleNamespace

import pytest
import torch
from dualedit.training.attention import _NAME, attend_by_head, attention_by_head
from dualedit.training.narrow import can_narrow, run_narrow
from dualedit.training.norms import quick_norms
from dualedit.training.sight import Block, sight_of
from tiny_models import BLIP2, LLAVA, QWEN
from torch import nn
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2RMSNorm,
    eager_attention_forward,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.llama.modeling_llama import eager_attention_forward as eager

FAMILIES = pytest.mark.parametrize("family", [LLAVA, QWEN, BLIP2], ids=lambda family: family.name)


def packed(rows, queries, keys):
    """What is closed where one row begins with padding, which sees nothing, and the other has two endings."""
    closed = torch.ones(rows, 1, queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    closed[0, ..., :25] = True
    closed[1, :, 100:, 80:100] = True
    return closed


def attention_of(call, q, k, v, mask, layer, scaling, upstream):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = call(layer, q, k, v, mask, scaling=scaling)[0]
    return out.detach(), torch.autograd.grad(out, (q, k, v), upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", ["none", "causal", "packed", "window", "rows", "heads"])
@pytest.mark.parametrize("scaling", [0.25, 0.3])  # a power of two goes another way
@pytest.mark.parametrize("groups", [2, 4])
def test_by_head_is_as_near_to_the_truth_as_eager(dtype, masked, scaling, groups, generator, monkeypatch):
    monkeypatch.setattr("dualedit.training.sight._QUERIES", 30)  # four blocks, the last a smaller one
    monkeypatch.setattr("dualedit.training.attention._HEADS", 3)  # then one alone
    rows, heads, queries, keys = 2, 4, 130, 140

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = numbers(rows, queries, heads, 32).transpose(1, 2), numbers(rows, groups, keys, 32)
    v, upstream = numbers(rows, groups, keys, 24), numbers(rows, queries, heads, 24)
    closed = {
        "none": None,
        "causal": torch.ones(1, 1, queries, keys, dtype=torch.bool).triu(11),
        "packed": packed(rows, queries, keys),
        "window": torch.ones(1, 1, queries, keys, dtype=torch.bool).triu(11)
        | torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(-20),
        "rows": torch.rand(rows, 1, queries, keys, generator=generator) < 0.5,
        "heads": torch.rand(1, heads, queries, keys, generator=generator) < 0.5,
    }[masked]
    layer = SimpleNamespace(num_key_value_groups=heads // groups, training=False)
    lowest = torch.finfo(dtype).min
    mask, exact = (
        None if closed is None else torch.zeros(closed.shape, dtype=d).masked_fill(closed, lowest)
        for d in (dtype, torch.float64)
    )
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    weights = leaves[0] @ leaves[1].repeat_interleave(heads // groups, 1).transpose(2, 3) * scaling
    weights = (weights if exact is None else weights + exact).softmax(-1)
    true = (weights @ leaves[2].repeat_interleave(heads // groups, 1)).transpose(1, 2)
    true = true.detach(), torch.autograd.grad(true, leaves, upstream.double())
    found = attention_of(attend_by_head, q, k, v, mask, layer, scaling, upstream)
    plain = attention_of(eager, q, k, v, mask, layer, scaling, upstream)

    def errors(some):
        return [
            float((a - b).norm() / b.norm())
            for a, b in zip((some[0], *some[1]), (true[0], *true[1]), strict=True)
        ]

    for ours, theirs in zip(errors(found), errors(plain), strict=True):
        assert ours <= 1.5 * theirs + 1e-7


def test_blocks_hold_all_that_is_seen_and_little_else(generator, monkeypatch):
    monkeypatch.setattr("dualedit.training.sight._QUERIES", 30)
    closed = packed(2, 130, 140)
    mask = torch.zeros(closed.shape).masked_fill(closed, torch.finfo(torch.float32).min)
    sight = sight_of(mask, 130, 140, torch.bfloat16)
    assert sight.mask.dtype == torch.bfloat16
    assert sight_of(mask, 130, 140, torch.bfloat16).blocks is sight.blocks  # noted
    (_, first), (_, again), (_, second), _ = sight.heads(2, 2)
    assert first is again
    assert [len(mask) for mask, _ in sight.heads(2, 5, together=2)] == [1] * 6
    each = sight_of(torch.rand(2, 5, 130, 140, generator=generator), 130, 140, torch.float32)
    found = [mask for mask, _ in each.heads(2, 5, together=2)]
    assert [len(mask) for mask in found] == [2, 2, 1] * 2 and torch.equal(found[4], each.mask[1, 2:4])
    # Row 0: queries up to 14 see nothing, which eager attention takes for everything.
    assert first[0] == Block(slice(0, 33), slice(0, 140), slice(0, 140))
    assert first[1] == Block(slice(33, 66), slice(25, 76), slice(44, 76))
    assert second[1] == Block(slice(33, 66), slice(0, 76), slice(44, 76))
    assert second[3] == Block(slice(99, 130), slice(0, 140), slice(80, 140))
    mask[1, :, 40, 3] = 0.5  # a bias that closes nothing
    changed = sight_of(mask, 130, 140, torch.bfloat16)
    (_, first), (_, second) = changed.heads(2, 1)
    assert second[1] == Block(slice(33, 66), slice(0, 76), slice(3, 76)) and first[1].masked.start == 44
    opened = sight_of(torch.zeros(1, 1, 40, 50), 40, 50, torch.float32)
    assert opened.blocks == [[Block(slice(0, 40), slice(0, 50), None)]]


def test_what_changes_the_result_is_left_to_the_model(generator):
    q, k, v = (torch.randn(1, 2, 140, 16, generator=generator) for _ in range(3))
    layer = object.__new__(Gemma2Attention)
    nn.Module.__init__(layer)
    layer.num_key_value_groups = 1
    found = attend_by_head(layer, q, k, v, None, scaling=0.3, softcap=2.0)
    wanted = eager_attention_forward(layer, q, k, v, None, scaling=0.3, softcap=2.0)
    assert torch.equal(found[0], wanted[0]) and found[1] is not None
    assert not torch.allclose(found[0], attend_by_head(layer, q, k, v, None, scaling=0.3)[0])
    doubles = [t.double() for t in (q, k, v)]
    assert attend_by_head(layer, *doubles, None, scaling=0.3)[1] is not None
    with pytest.raises(ValueError, match="has no eager attention"):
        attend_by_head(nn.Linear(1, 1), *doubles, None, scaling=0.3)


@FAMILIES
def test_a_models_attention_by_head(family, generator, monkeypatch):
    monkeypatch.setattr("dualedit.training.attention._WORTH_IT", 0)
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    model = family.build().eval()
    rows = family.questions(3, generator)
    with torch.no_grad():
        with attention_by_head(model) as count:
            assert count == 0  # this model's attention is the fused one
        model.set_attn_implementation("eager")
        wanted = model(**rows).logits
        taken = []
        monkeypatch.setattr(
            "dualedit.training.attention.attend_by_head",
            lambda *args, **more: taken.append(1) or attend_by_head(*args, **more),
        )
        with pytest.raises(KeyError), attention_by_head(model) as count:
            found = model(**rows).logits
            raise KeyError
    assert count > 0 and taken
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    kinds = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert kinds == {"eager"} and _NAME not in kinds


@pytest.fixture
def layer(generator):
    """A decoder layer with what it is called with: 3 rows of 9 tokens, the first 2 of row 1 padding."""
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    states = torch.randn(3, 9, 16, generator=generator)
    closed = torch.ones(3, 1, 9, 9, dtype=torch.bool).triu(1)
    closed[1, ..., :2] = True
    positions = torch.arange(9)[None]
    kwargs = {
        "attention_mask": torch.zeros(3, 1, 9, 9).masked_fill(closed, torch.finfo(torch.float32).min),
        "position_ids": positions,
        "position_embeddings": LlamaRotaryEmbedding(config)(states, positions),
        "past_key_values": None,
        "use_cache": False,
    }
    at = torch.zeros(3, 9, dtype=torch.bool)
    at[0, 8] = at[1, 4] = at[1, 6] = at[1, 7] = at[2, 0] = True
    return LlamaDecoderLayer(config, 0).eval(), states, kwargs, at


def test_a_narrow_layer_gives_what_the_whole_one_gives(layer):
    module, states, kwargs, at = layer
    assert can_narrow(module, (), kwargs, at)
    seen = []
    module.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2].numel()))
    results = []
    for run in (lambda x: run_narrow(module, x, kwargs, at), lambda x: module(x, **kwargs)[at]):
        x = states.clone().requires_grad_()
        out = run(x)
        results.append((out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), x)))
    assert seen == [9, 27]  # rows x the most positions of one, and all
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": None},
        {"attention_mask": torch.zeros(3, 9)},
        {"past_key_values": object()},
        {"rates": torch.ones(3)},
        {"position_embeddings": torch.ones(3, 9, 4)},
    ],
)
def test_a_layer_that_cannot_be_cut_runs_whole(change, layer):
    module, _, kwargs, at = layer
    assert not can_narrow(module, (), kwargs | change, at)
    assert not can_narrow(module, (torch.ones(1),), kwargs, at)
    without = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    assert not can_narrow(module, (), without, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 41, 96), (1, 1, 96), (2, 5, 3, 96)], ids=str)
def test_quick_norms_give_the_same_bits_and_as_true_gradients(dtype, shape, generator, monkeypatch):
    monkeypatch.setattr("dualedit.training.norms._PIECE", 96 * 7)
    monkeypatch.setattr("dualedit.training.norms._WORTH_IT", 0)
    norm = LlamaRMSNorm(96, eps=1e-3)
    norm.weight.data = torch.randn(96, generator=generator)
    norm = norm.to(dtype).requires_grad_(False)
    x = torch.randn(shape, generator=generator).mul_(torch.rand(shape[:-1] + (1,), generator=generator))
    x, upstream = (t.to(dtype) for t in (x, torch.randn(shape, generator=generator)))

    def run(call, x):
        x = x.clone().requires_grad_()
        out = call(x)
        return out.detach(), torch.autograd.grad(out, x, upstream.to(x.dtype))[0]

    plain = run(norm, x)
    with pytest.raises(KeyError), quick_norms(nn.ModuleList([norm])) as count:
        assert count == 1
        found = run(norm, x)
        noise = torch.randn(
            4, 96, generator=generator
        )  # another dtype than the weight's: the model's own way
        assert norm(noise.double()).dtype in (torch.float64, dtype)
        raise KeyError
    assert "forward" not in norm.__dict__
    assert torch.equal(found[0], plain[0])
    weight = norm.weight.double()
    true = run(lambda x: weight * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(), x.double())[1]
    errors = [float((each[1].double() - true).norm() / true.norm()) for each in (found, plain)]
    assert errors[0] <= 1.5 * errors[1] + 1e-7


class OddRMSNorm(LlamaRMSNorm):
    """One whose eps is not what its attribute says."""

    def forward(self, states):
        return self.weight * (states * (states.square().mean(-1, keepdim=True) + 0.5).rsqrt())


def test_other_norms_are_left_alone():
    """Gemma's adds 1 to its weight; a trained one needs its gradient."""
    trained, gemma, odd, plain = LlamaRMSNorm(32), Gemma2RMSNorm(32), OddRMSNorm(32), LlamaRMSNorm(32)
    norms = nn.ModuleList([gemma, odd, nn.LayerNorm(32), plain]).requires_grad_(False).append(trained)
    with quick_norms(norms) as count:
        assert count == 1 and "forward" in plain.__dict__
