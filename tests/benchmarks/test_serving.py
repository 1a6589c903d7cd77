"""The load test: that it sees each kind of fault, and a run of some seconds without any."""

import pytest

from benchmarks.serving import Asked, Life, Question, Run, judge, measure

QUESTION = Question(b"", 0, {None: "spain", 0: "norway"})
FOREVER = float("inf")


@pytest.mark.parametrize(
    ("asked", "counts"),
    [
        (Asked(QUESTION, 0.0, 0.5, "spain", None), (0, 0, 0)),  # before the edit
        (Asked(QUESTION, 0.5, 1.5, "norway", 7), (0, 0, 0)),  # while it is made
        (Asked(QUESTION, 3.0, 4.0, "norway", 7), (0, 0, 0)),
        (Asked(QUESTION, 3.0, 4.0, "spain", 7), (1, 0, 0)),
        (Asked(QUESTION, 0.0, 0.5, "norway", None), (1, 0, 0)),
        (Asked(QUESTION, 3.0, 4.0, "spain", None), (0, 1, 0)),
        (Asked(QUESTION, 3.0, 5.5, "spain", None), (0, 0, 0)),  # while it is removed
        (Asked(QUESTION, 0.0, 0.5, "norway", 7), (0, 0, 1)),
        (Asked(QUESTION, 7.0, 8.0, "norway", 7), (0, 0, 1)),
        (Asked(QUESTION, 3.0, 4.0, "norway", 8), (0, 0, 1)),
    ],
)
def test_faults_are_seen(asked, counts):
    run = Run(asked=[asked], lives={7: Life(0, asked=1.0, made=2.0, leaving=5.0, gone=6.0)})
    assert tuple(judge(run).values()) == counts


@pytest.mark.slow
def test_some_seconds_of_it():
    figures = measure(0.1, rounds=0, warm=0)
    assert figures["errors"] == []
    assert [figures[name] for name in ("wrong", "missed", "ghosts", "lost")] == [0, 0, 0, 0]
    assert figures["asked"] > 16 and figures["edits made"] > 0
