"""The visual vocabulary of `smol` in training is what transformers' modules make of its weights."""

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "recipes" / "smol"


@pytest.fixture
def scripts(monkeypatch):
    """The recipe's scripts import each other by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@torch.no_grad()
def test_stock_modules_make_the_same_tokens(scripts, generator):
    from dualedit.smol.model import WIDTH, WORDS, tower_config
    from lite import Lite
    from tower import Projector
    from transformers import EfficientNetModel
    from vocabulary import Vocabulary

    tower = EfficientNetModel(tower_config()).eval()
    for name, value in tower.named_parameters():
        if "squeeze_excite" in name:  # Lite has none: as `read_tower` sets them
            value.fill_(30.0 if name.endswith("expand.bias") else 0.0)
        elif value.dim() > 1:
            torch.nn.init.kaiming_normal_(value, generator=generator)
        elif name.endswith(("norm.weight", "bn.weight")):
            value.fill_(1.0)
    names = torch.randn(40, WIDTH, generator=generator) * 0.1
    classes = torch.nn.functional.normalize(torch.randn(40, 1280, generator=generator), dim=1)
    pictures = torch.rand(3, 3, 128, 128, generator=generator) * 2 - 1
    features = Lite(tower)(pictures).flatten(2).transpose(1, 2)
    mean = features.mean((0, 1))
    vocabulary = Vocabulary()
    vocabulary.start(classes, mean, (features - mean).norm(dim=-1).mean(), names, torch.full((WIDTH,), 0.01))
    vocabulary.words.bias.fill_(0.5)  # all neurons open, so that something comes out
    mark = torch.randn(WIDTH, generator=generator)
    parts = vocabulary.parts(mark)
    projector = Projector()
    for name, value in parts.items():
        part, rest = name.split(".", 1)
        module = {"tower": tower, "projector": projector}[part]
        assert module.get_parameter(rest).shape == value.shape, name
        module.get_parameter(rest).copy_(value)
    expected = vocabulary(features) + mark
    assert vocabulary.words.out_features == WORDS and (expected - mark).std() > 1e-3
    tokens = projector(tower(pictures).last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-3)
