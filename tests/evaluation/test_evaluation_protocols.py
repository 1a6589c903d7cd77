"""Protocols and scorings, computed by hand on a method that says what it is told to."""

import pytest
from dualedit import EditRequest, EditSample, Probe
from dualedit.evaluation import METRICS, MORE_PROBED, PROTOCOLS, Method, Plan, Unedited, evaluate
from scripted_method import Scripted, chain, chained, picture

ONE, ALIKE, OTHER = 1, 2, 3

# One edit, everything asked about it, and what the method says. Gold answers of the data set in brackets.
SAMPLE = EditSample(
    EditRequest(picture(ONE), "who ?", "ann lee"),
    {
        "t_gen": [Probe(picture(ONE), "whose ?"), Probe(picture(ONE), "by whom ?")],
        "v_gen": [Probe(picture(9), "who ?")],
    },
    {
        "t_loc": [Probe(None, "sky ?", "green sea")],
        "m_loc": [Probe(picture(OTHER), "what ?", "red car")],
        "hard_image": [Probe(picture(ALIKE), "who ?", "bob")],
        "hard_question": [Probe(picture(8), "where ?")],
    },
    portability={"1-hop": [Probe(picture(ONE), "land ?", "upper france")], "2-hop": [Probe(None, "why ?")]},
)
BEFORE = {
    (ONE, "who ?"): "old name", (None, "sky ?"): "blue sky", (OTHER, "what ?"): "red car",
    (ALIKE, "who ?"): "bob", (8, "where ?"): "in paris", (ONE, "where ?"): "in paris",
    (None, "who ?"): "nobody here", (ONE, "land ?"): "spain",
}  # fmt: skip
AFTER = {
    (ONE, "who ?"): "Ann  Lee.",  # free: right
    (ONE, "whose ?"): "ann lee",  # right
    (ONE, "by whom ?"): "ann bee",  # free: wrong; one of two tokens
    (9, "who ?"): "it is ann lee",  # free: wrong, but it contains the answer; no token in its place
    (None, "sky ?"): "blue sky",  # as before, though not what the data set says
    (OTHER, "what ?"): "red bus",  # changed; one of the data set's two tokens kept
    (ALIKE, "who ?"): "bob",
    (None, "who ?"): "ann here",  # without the image: changed; one of two tokens kept
    (ONE, "land ?"): "upper france",
}
FREE = dict(rel=100, t_gen=50, v_gen=0, t_loc=100, m_loc=0, hard_image=100, hard_question=100, no_image=0,
            same_image=100, portability=100, hm=0, avg=50)  # fmt: skip
CONTAINS = FREE | dict(v_gen=100, hm=3 / (1 / 50 + 2 / 100), avg=70)
FORCED = FREE | dict(rel=0, t_gen=75, m_loc=50, no_image=50, avg=45)  # "Ann  Lee." is other words


def scripted(**more):
    return Scripted(BEFORE, {"ann lee": AFTER}, **more)


def test_every_metric_in_every_scoring_by_hand():
    """The published gate opens for the look-alike too, asked with its own answer in the input."""
    seen = {"ann lee": {**AFTER, (ONE, "who ?"): "ann lee", (ALIKE, "who ?"): "ann lee"}}
    plan = Plan(scorings=("free", "teacher_forced", "published"))
    method = scripted(published=seen)
    assert isinstance(method, Method)
    free, forced, published = evaluate(method, [SAMPLE], plan, progress=False)
    assert free.row.metrics == pytest.approx(FREE)
    assert free.row.contains == pytest.approx(CONTAINS)
    assert forced.row.metrics == pytest.approx(FORCED)
    assert forced.row.contains is None
    assert published.row.metrics == pytest.approx(FORCED | dict(rel=100, hard_image=0, avg=65))
    assert [r.row.scoring for r in (free, forced, published)] == ["free", "teacher_forced", "published"]
    assert [r.row.to_dict().get("sees_answer") for r in (free, forced, published)] == [None, None, True]
    assert method.stored == []


def test_a_wordless_unedited_answer_cannot_be_forced_and_is_left_out():
    method = Scripted({**BEFORE, (8, "where ?"): "", (ONE, "where ?"): "in paris"}, {"ann lee": AFTER})
    free, forced = evaluate(method, [SAMPLE], Plan(scorings=("free", "teacher_forced")), progress=False)
    assert free.row.metrics["hard_question"] == 100
    assert forced.row.metrics["hard_question"] is None


def test_figures_of_the_table_are_asked_in_a_batch_of_their_own():
    """A batch decides how sums are rounded: what others ask besides must not change the headline."""
    method = scripted()
    evaluate(method, [SAMPLE], Plan(costs=False), progress=False)
    main = ["who ?", "whose ?", "by whom ?", "who ?", "sky ?", "what ?", "who ?", "where ?"]
    asked = [entry[1] for entry in method.log if entry[0] == "answers"]
    assert asked == [main, ["who ?", "where ?"], ["land ?"]] * 2  # before, and after
    alone = scripted()
    evaluate(alone, [SAMPLE], Plan(more=False, costs=False), progress=False)
    assert [entry[1] for entry in alone.log if entry[0] == "answers"] == [main, main]


def test_same_image_falls_back_on_the_questions_of_m_loc_and_text_edits_have_neither():
    plain = EditSample(SAMPLE.request, {}, {"m_loc": [Probe(picture(OTHER), "what ?")]})
    records = evaluate(scripted(), [plain], progress=False)[0].records
    assert [(r["metric"], r["prompt"]) for r in records][2:] == [
        ("no_image", "who ?"),
        ("same_image", "what ?"),
    ]
    text = EditSample(EditRequest(None, "who ?", "ann lee"), {}, {"t_loc": [Probe(None, "sky ?")]})
    assert [r["metric"] for r in evaluate(scripted(), [text], progress=False)[0].records] == ["rel", "t_loc"]


def test_companions_are_stored_for_portability_alone():
    also = EditRequest(picture(OTHER), "what ?", "companion")
    sample = EditSample(SAMPLE.request, {}, {}, portability=SAMPLE.portability, companions=[also])
    method = scripted()
    evaluate(method, [sample], Plan(costs=False), progress=False)
    done = [entry for entry in method.log if entry[0] != "answers" or entry[1] == ["land ?"]]
    assert done[1:5] == [("edit", "ann lee"), ("edit", "companion"), ("answers", ["land ?"]), ("reset",)]


def test_costs_are_measured_and_stay_out_of_the_figures():
    row = evaluate(scripted(), [SAMPLE], progress=False)[0].row
    assert row.costs["edit_bytes"] == 100
    assert all(row.costs[name] > 0 for name in ("edit_seconds", "answer_seconds", "answer_seconds_unedited"))
    assert "costs" in row.to_dict()
    bare = evaluate(scripted(), [SAMPLE], Plan(costs=False), progress=False)[0].row
    assert "costs" not in bare.to_dict() and bare.metrics == row.metrics


def test_a_method_that_holds_edits_is_refused():
    method = scripted()
    method.edit(SAMPLE)
    with pytest.raises(ValueError, match="holds edits already"):
        evaluate(method, [SAMPLE], progress=False)


def test_the_sample_is_named_when_a_method_refuses_its_edit():
    method = scripted()

    def refuse(sample):
        raise ValueError("no image.")

    method.edit = refuse
    with pytest.raises(ValueError, match="sample 0, with scripted: no image."):
        evaluate(method, [SAMPLE], progress=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(protocol="batched"), "protocol='batched': choose one of"),
        (dict(protocol="batch", together=0), "together=0: pass at least 1"),
        (dict(together=2), "together=2: pass at least 1, with protocol='batch' only"),
        (dict(scorings=("free", "best")), "choose from"),
        (dict(scorings=()), "choose from"),
        (dict(asked=0), "asked=0"),
    ],
)
def test_bad_plans(settings, says):
    with pytest.raises(ValueError, match=says):
        Plan(**settings)


# ---------------------------------------------------------------------- several edits


@pytest.mark.parametrize("scoring", ["free", "teacher_forced", "published"])
def test_batch_a_look_alike_that_is_edited_too_has_to_get_its_own_answer(scoring):
    plan = Plan("batch", (scoring,), asked=3, more=False)
    (right,) = evaluate(chained(4), chain(4), plan, progress=False)
    assert (right.row.edits, right.row.n, right.row.protocol) == (4, 3, "batch")
    assert (right.row.metrics["rel"], right.row.metrics["hard_image"]) == (100, 100)
    # Remembering two of four: facts 2 and 3. Asked about 0, 1, 2: of the edits the last is right, of the
    # look-alikes (1, 2, 3) the last two; "old 1" shares no token with "new 1" but the number.
    (forgetful,) = evaluate(chained(4, holds=2), chain(4), plan, progress=False)
    part = 0.5 if scoring != "free" else 0.0  # "old 0" against "new 0"; "as ever" has nothing right
    assert forgetful.row.metrics["rel"] == pytest.approx(100 * (2 * part + 1) / 3)
    assert forgetful.row.metrics["hard_image"] == pytest.approx(100 * (part + 2) / 3)
    assert forgetful.row.metrics["v_gen"] == pytest.approx(100 / 3)


def test_a_batch_in_groups_meets_its_own_group_only():
    """Five facts, two stored at a time; the look-alike of a group's last fact is not edited there."""
    method = chained(5)
    plan = Plan("batch", asked=4, together=2, more=False, costs=False)
    (found,) = evaluate(method, chain(5), plan, progress=False)
    assert (found.row.edits, found.row.n) == (2, 4)
    assert found.row.metrics["rel"] == found.row.metrics["hard_image"] == 100
    # Facts 0, 1 together, then 2, 3; nobody is asked about 4, so it is not stored.
    edits = [("edit", f"new {i}") for i in range(4)]
    log = [entry for entry in method.log if entry[0] in ("edit", "reset")]
    assert [entry for entry in log if entry[0] == "edit"] == edits
    assert ("reset",) in log[2:-2]
    expected = [r["expected"] for r in found.records if r["metric"] == "hard_image"]
    assert expected == ["new 1", "old 2", "new 3", "old 4"]
    alone = evaluate(chained(5), chain(5), Plan("batch", together=1, more=False), progress=False)[0]
    single = evaluate(chained(5), chain(5), Plan("single", more=False), progress=False)[0]
    assert alone.row.edits == 1 and alone.row.metrics == single.row.metrics


def test_sequential_asks_after_each_edit_and_again_at_the_end():
    """Remembering the newest edit only: all right directly after, a quarter at the end."""
    method = chained(4, holds=1)
    (found,) = evaluate(method, chain(4), Plan("sequential", more=False, costs=False), progress=False)
    row = found.row
    assert (row.edits, row.n) == (4, 4)
    assert (row.metrics["rel"], row.metrics["v_gen"]) == (100, 100)
    # Directly after edit i the look-alike i+1 is not edited yet; at the end it is, and forgotten but for
    # the last two facts: 3 is remembered, 4 was never edited.
    assert row.metrics["hard_image"] == 100
    assert row.end["metrics"]["rel"] == row.end["metrics"]["v_gen"] == 25
    assert row.end["metrics"]["hard_image"] == 50
    assert row.metrics["retention"] == 25
    assert row.stderr["retention"] == pytest.approx(25)  # sqrt(p q / (n - 1)) = sqrt(3 / 16 / 3)
    assert [entry for entry in method.log if entry[0] == "edit"] == [("edit", f"new {i}") for i in range(4)]
    assert [r["phase"] for r in found.records] == ["after"] * 12 + ["end"] * 12
    assert set(row.to_dict()["end"]) == {"metrics", "stderr", "interval"}


def test_retention_counts_what_was_right_and_still_is():
    """Fact 0: one of two probes is right after its edit and none at the end; fact 1: both and one."""
    samples = chain(2)
    method = chained(2)
    del method.after["new 0"][0, "whose ?"]
    method.after["new 1"][0, "who ?"] = "lost"  # the second edit overwrites the first
    (found,) = evaluate(method, samples, Plan("sequential", more=False), progress=False)
    assert found.row.metrics["v_gen"] == 50 and found.row.end["metrics"]["rel"] == 50
    assert found.row.metrics["retention"] == pytest.approx((0 + 100) / 2)


def test_places():
    assert Plan("batch", asked=3).places(10) == [0, 1, 2]
    assert Plan("single", asked=3).places(4) == [0, 1, 2, 3]
    assert Plan("sequential", asked=3).places(9) == [0, 4, 8]
    assert Plan("sequential", asked=1).places(9) == [0]
    assert [Plan(p).places(3) for p in PROTOCOLS] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("protocol", ["batch", "sequential"])
def test_a_fact_edited_twice_is_refused(protocol):
    samples = [*chain(2), chain(1)[0]]
    with pytest.raises(ValueError, match="twice"):
        evaluate(chained(3), samples, Plan(protocol), progress=False)
    assert evaluate(chained(3), samples, Plan("single"), progress=False)[0].row.n == 3


def test_the_unedited_model_is_asked_once_for_all_methods():
    samples, plan = chain(3), Plan(costs=False)
    shared = Unedited(samples, plan.more)
    first, second = chained(3), chained(3)
    results = [evaluate(method, samples, plan, shared, progress=False)[0] for method in (first, second)]
    assert results[0].row.metrics == results[1].row.metrics
    asked = [sum(entry[0] == "answers" for entry in method.log) for method in (first, second)]
    assert asked == [2 * asked[1], asked[1]]


def test_rows_hold_every_metric_by_name():
    row = evaluate(scripted(), [SAMPLE, SAMPLE], progress=False)[0].row.to_dict()
    names = {*METRICS, *MORE_PROBED}
    for figures in ("metrics", "stderr", "interval", "contains", "contains_interval"):
        assert set(row[figures]) == names
    assert list(row)[:7] == ["method", "scoring", "protocol", "edits", "n", "metrics", "stderr"]
