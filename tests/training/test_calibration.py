"""What a calibration leaves behind: its curve, a plot, and a threshold that travels with the adapter."""

import math

import pytest
from dualedit import DualEditConfig, inject_dualedit, save_edits
from dualedit.editor import Editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import (
    Curve,
    calibrate_alpha,
    calibrate_threshold,
    load_calibration,
    measure_curve,
    plot_calibration,
    save_calibration,
    sweep_alpha,
    sweep_reach,
    sweep_threshold,
    with_threshold,
)
from dualedit.training.calibration import Point
from dualedit.tuners.adapter import active_adapter
from PIL import Image


def _point(metric, distance, opened, closed, positive=math.nan, negative=math.nan):
    return Point(0, metric, distance, opened, closed, positive, negative)


def _curve(positive=math.nan, negative=math.nan):
    """Related probes lie at 0.1 and 0.3, a look-alike at 0.5, the rest at 0.9."""
    between = (positive, negative)
    return Curve(
        (
            _point("rel", 0.0, True, False, *between),
            _point("t_gen", 0.1, True, False, *between),
            _point("v_gen", 0.3, True, False, *between),
            _point("hard_image", 0.5, False, True, *between),
            _point("hard_question", 0.9, False, True, *between),
            _point("t_loc", 0.9, False, True, *between),
            _point("m_loc", 1.0, False, True, *between),
        )
    )


def test_a_sweep_by_hand():
    """Radii 0, 0.2 ... 1: all is right at 0.4 alone, where the photo is inside and the look-alike is not."""
    sweep = sweep_threshold(_curve(), steps=5)
    assert sweep.values == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2, 0.0))
    assert [figures["v_gen"] for figures in sweep.figures] == [0, 0, 100, 100, 100, 100]
    assert [figures["hard_image"] for figures in sweep.figures] == [100, 100, 100, 0, 0, 0]
    # mean of t_gen, v_gen, hard_image, hard_question; an m_loc of 0 costs 10 times what it lacks to 99.8
    assert sweep.scores == pytest.approx((50, 75, 100, 75, 75, 50 - 998))
    assert sweep.chosen == pytest.approx(0.6)
    assert sweep.chosen_figures == sweep.figures[2]
    assert calibrate_threshold(_curve(), 5) == (sweep.chosen, sweep.chosen_figures)


def test_a_sweep_of_alpha_by_hand():
    """Radii 0.65, 0.525, 0.4, 0.275, 0.15 between the two samples: 0.4 suits, at alpha 0.5."""
    sweep = sweep_alpha(_curve(0.15, 0.65), steps=4)
    assert sweep.values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert sweep.scores == (75, 75, 100, 75, 75)
    assert sweep.chosen == 0.5
    assert calibrate_alpha(_curve(0.15, 0.65), 4) == (0.5, sweep.figures[2])


def test_a_largest_radius_where_the_black_image_is_too_far():
    """Two edits want a radius of 0.4, and black images at 0.65 and 9 give it at no alpha."""
    far = [
        Point(1, p.metric, p.distance, p.open, p.closed, 0.05, 9.0) for p in _curve().points
    ]
    curve = Curve(_curve(0.15, 0.65).points + tuple(far))
    assert max(sweep_alpha(curve, steps=10).scores) < 100
    sweep, limit = sweep_reach(curve, alphas=10, steps=20)
    assert 0.3 <= limit < 0.5
    assert max(sweep.scores) == 100
    assert sweep_reach(_curve(0.15, 0.65), alphas=4) == (sweep_alpha(_curve(0.15, 0.65), 4), None)


def test_what_is_not_asked_does_not_count():
    """Facts without hard questions are judged by easy ones; a side that is missing is named."""
    easy = Curve(tuple(point for point in _curve().points if not point.metric.startswith("hard")))
    assert sweep_threshold(easy, steps=5).chosen_figures["m_loc"] == 100
    for lacking, left in (("must stay", ("rel", "v_gen")), ("changes", ("hard_image", "t_loc"))):
        points = tuple(point for point in _curve().points if point.metric in left)
        with pytest.raises(ValueError, match=f"nothing that {lacking}"):
            sweep_threshold(Curve(points), steps=5)


@pytest.mark.parametrize("sweep_of", [sweep_threshold, sweep_alpha])
def test_a_calibration_is_saved_beside_the_adapter(sweep_of, tmp_path):
    curve = _curve(0.2, 0.6) if sweep_of is sweep_alpha else _curve()
    sweep = sweep_of(curve, 7)
    file = save_calibration(tmp_path / "adapter", sweep, curve)
    assert [f.name for f in (tmp_path / "adapter").iterdir()] == [file.name] == ["calibration.json"]
    again, points = load_calibration(tmp_path / "adapter")
    assert again == sweep
    assert [p.distance for p in points.points] == [p.distance for p in curve.points]
    assert str(points) == str(curve)  # NaN is not equal to itself, but it is printed alike


def test_a_calibration_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="holds no calibration.json"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"version": 1, "sweep": {}')
    with pytest.raises(ValueError, match="damaged"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"version": 1, "sweep": {}, "points": []}')
    with pytest.raises(ValueError, match="damaged"):
        load_calibration(tmp_path)


def test_the_plot_is_a_picture_with_lines_in_it(tmp_path):
    file = plot_calibration(sweep_threshold(_curve(), 20), tmp_path / "curve.png")
    with Image.open(file) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 7  # a colour a metric at least


def test_adapters_that_write_nothing_are_not_calibrated():
    """As `inject_dualedit` makes them: every threshold would be as good as every other."""
    base, processor = load_embedded()
    editor = Editor(inject_dualedit(base, text_layer=1, vis_layer=2, mid_dim=16, num_heads=2), processor)
    samples = edit_samples(World(0), "train", 2, seed=5)
    with pytest.raises(ValueError, match="change no answer.*run dualedit train"):
        measure_curve(editor, samples, progress=False)
    assert not editor.edits


# ---------------------------------------------------------------------- a threshold that travels


@pytest.fixture
def calibrated(tmp_path):
    """A folder of adapters whose calibrated threshold is 0.25, which somebody then set to 0.5."""
    base, processor = load_embedded()
    model = inject_dualedit(base, text_layer=1, vis_layer=2, mid_dim=16, num_heads=2)
    with_threshold(Editor(model, processor), 0.25)
    active_adapter(model).config.threshold = 0.5
    save_edits(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_calibrated_is_what_calibration_found(calibrated):
    given = {"adapter": calibrated, "adapter_name": "shop"}
    as_saved = inject_dualedit(load_embedded()[0], **given)
    model = inject_dualedit(load_embedded()[0], **given, threshold="calibrated")
    by_hand = inject_dualedit(load_embedded()[0], **given, threshold=0.75)
    assert [m.peft_config["shop"].threshold for m in (as_saved, model, by_hand)] == [0.5, 0.25, 0.75]
    adapter = active_adapter(model)
    name, config = adapter.name, adapter.config
    assert (name, config.text_layer, config.vis_layer, config.mid_dim) == ("shop", 1, 2, 16)
    layers = [m for m in model.modules() if getattr(m, "configs", None) and "shop" in m.configs]
    assert {layer.configs["shop"].threshold for layer in layers} == {0.25}  # what the gate reads


def test_new_adapters_carry_no_calibrated_threshold():
    base = load_embedded()[0]
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="carry no calibrated threshold.*adapter="):
        inject_dualedit(base, text_layer=1, vis_layer=1, threshold="calibrated")
    assert [name for name, _ in base.named_modules()] == names
    assert inject_dualedit(base, text_layer=1, vis_layer=1, mid_dim=8).peft_config["default"].threshold == 0.8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mid_dim": 32}, "mid_dim=32: the adapters in .* have 16"),
        ({"text_layer": None}, "text_layer=None: the adapters in .* have 1"),
        ({"threshold": 1.5}, r"threshold=1.5: a cosine lies in \[-1, 1\]"),
        ({"threshold": "best"}, "threshold='best'"),
    ],
)
def test_settings_that_the_adapters_do_not_have(settings, says, calibrated):
    with pytest.raises(ValueError, match=says):
        inject_dualedit(load_embedded()[0], adapter=calibrated, **settings)


def test_a_folder_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        inject_dualedit(load_embedded()[0], adapter=tmp_path)


def test_a_config_may_be_asked_for_its_calibrated_threshold():
    assert DualEditConfig(threshold="calibrated", calibrated_threshold=0.9).threshold == 0.9
    with pytest.raises(ValueError, match="calibrated_threshold=2"):
        DualEditConfig(calibrated_threshold=2)
