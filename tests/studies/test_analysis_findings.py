"""The figures of docs/analysis.md are those of the committed results."""

from pathlib import Path

import pytest
from dualedit import DualEditConfig
from dualedit.tuners import BalancEditConfig

from studies.analysis_findings import MODELS, load, recommendations, table

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_the_page_shows_the_results():
    text, found = PAGE.read_text(encoding="utf-8"), load()
    assert table(found) in text
    assert recommendations(found) in text


@pytest.mark.parametrize("model", MODELS)
def test_recommendations_are_settings(model):
    told = load()[model]["recommendation"]
    DualEditConfig(**told["dualedit"]["arguments"])
    BalancEditConfig(**told["balancedit"]["arguments"])
    assert load()[model]["arguments"]["--model"] == model
