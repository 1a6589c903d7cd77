"""What methods, metrics and questions are called on pages and in tables."""

from __future__ import annotations

from ..evaluation.metrics import BY_KIND, METRICS, MORE_PROBED

NAMES = {
    "dualedit": "DualEdit", "balancedit": "BalancEdit", "base": "Unedited", "ft-l": "FT-L", "ft-v": "FT-V",
    "lora": "LoRA", "ike": "IKE", "retrieval": "Retrieval note", "grace": "GRACE", "visedit": "VisEdit",
    "tp": "T-Patcher", "wise": "WISE", "mend": "MEND", "ke": "KE", "liveedit": "LiveEdit", "serac": "SERAC",
    "recipe": "RECIPE", "lte": "LTE",
}  # fmt: skip

# What a probe is, and what an editor is to do with it, in the order of a story.
KINDS = {
    "rel": ("same input", "new answer"),
    "t_gen": ("rephrased", "new answer"),
    "v_gen": ("new picture", "new answer"),
    "portability": ("what follows", "new answer"),
    "hard_image": ("look-alike", "as before"),
    "hard_question": ("other question", "as before"),
    "same_image": ("other question, same picture", "as before"),
    "no_image": ("picture left out", "as before"),
    "t_loc": ("text only", "as before"),
    "m_loc": ("other picture", "as before"),
}
# In the order of a table's columns.
TITLES = {
    "rel": "Rel", "t_gen": "T-Gen", "v_gen": "V-Gen", "v_gen_view": "V-Gen view",
    "v_gen_artist": "V-Gen artist", "t_loc": "T-Loc", "m_loc": "M-Loc", "hard_image": "Hard image",
    "hard_image_random": "random", "hard_image_nearest": "nearest", "hard_image_same_artist": "same artist",
    "hard_question": "Hard question", "no_image": "No image", "same_image": "Same image",
    "portability": "Portability", "portability_in_words": "In words", "retention": "Retention", "hm": "HM",
    "avg": "Avg",
}  # fmt: skip
MEANINGS = {
    "rel": "the edit itself",
    "t_gen": "same picture, other words",
    "v_gen": "new pictures of the same thing",
    "v_gen_view": "the same drawing on another ground, turned, cropped, in other light",
    "v_gen_artist": "another artist's drawing of it",
    "t_loc": "no picture: as before",
    "m_loc": "unrelated picture: as before",
    "hard_image": "look-alike: as before",
    "hard_image_random": "look-alike, any of the same group, by another artist",
    "hard_image_nearest": "look-alike, the nearest of the same group by pixels, by another artist",
    "hard_image_same_artist": "look-alike, the nearest of the same group by pixels, by the edit's own artist",
    "hard_question": "other question about it: as before",
    "no_image": "the edited question without its picture: as before",
    "same_image": "another question about the edit's very picture: as before",
    "portability": "what follows from the edit",
    "portability_in_words": "the name in place of the picture: how often the new answer comes; it need not",
    "retention": "of what was right directly after the edit, what still is after the last one",
    "hm": "harmonic: T-Gen, V-Gen, Hard image",
    "avg": "mean of Rel, T-Gen, V-Gen, T-Loc, M-Loc",
}
IN_ORDER = ("avg", "hm", *(name for name in TITLES if name not in ("avg", "hm")))  # what sums up goes first
SCORINGS = {
    "free": "Free generation, exact match",
    "teacher_forced": "Teacher-forced token accuracy",
    "published": "Published protocol (sees the answer)",
}
SCORING_NOTES = {
    "free": "The model writes its answer; all of it has to be right. What a user sees.",
    "teacher_forced": "The right answer is given token by token; the gate reads the question alone.",
    "published": "Token accuracy with a gate that is shown the answer too: for comparison with other "
    "people's tables only. No such gate can work when the answer is yet to be written.",
}
assert set(TITLES) == set(MEANINGS) == {*METRICS, *MORE_PROBED, *BY_KIND, "retention"}
assert set(KINDS) == set(METRICS) - {"hm", "avg"} | set(MORE_PROBED)


def method_name(method: str) -> str:
    """A method as people write it."""
    return NAMES.get(method, method)


def near(distance: float) -> str:
    """A distance for people: three digits; what is nearly nothing is not called nothing."""
    return "<0.001" if 0 < distance < 5e-4 else f"{distance:.3g}"
