"""Words of the demo world: answer vocabularies, question wordings and text-only facts.

Every string is lower case.  A question has one canonical wording (the one an edit is requested with), two
wordings kept for testing text generality, and the rest ("rephrases") that an editing method may use as
positives. The base model is trained on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A brand name is one opening plus one ending: two word pieces on purpose, so that edits have multi-token
# targets.
BRAND_OPENINGS = (
    "bar bel dax dor fen fip gam gol hux jav jel kib kor lum lax mip mov nef nur "
    "pex pol qua rud rix sav sil tam tov vex vun wob zor"
).split()
BRAND_ENDINGS = (
    "ba bo da de do fi fo ga go ja ji ka ki ko la li lo ma mi na no pa po ra ri sa so ta to va vo za"
).split()

COUNTRIES = (
    "france japan brazil canada egypt italy kenya spain china india norway peru "
    "poland greece sweden mexico turkey cuba chile ireland"
).split()
PRODUCTS = (
    "shoes watches bicycles cameras guitars phones chairs soap coffee tea bread toys "
    "lamps tents knives paint pianos robots boats carpets"
).split()
ANIMALS = (
    "lion tiger bear wolf fox eagle owl shark whale horse camel frog snake rabbit "
    "zebra monkey panda goat duck turtle"
).split()
FOUNDERS = (
    "anna boris carla david elena felix greta hugo irene jonas klara leon maria nils olga "
    "peter rosa simon tanja ulrich vera walter yara zeno"
).split()


@dataclass(frozen=True)
class Wordings:
    """Wordings of one question: ``canonical`` to edit with, ``test`` held back, ``rephrases`` free to use."""

    canonical: str
    test: tuple[str, ...]
    rephrases: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every wording, canonical first."""
        return (self.canonical, *self.test, *self.rephrases)


QUESTIONS: dict[str, Wordings] = {
    "brand": Wordings(
        "what brand is this logo?",
        ("which brand does this logo stand for?", "name the brand shown here."),
        (
            "what is the name of this brand?",
            "whose logo is this?",
            "this is the logo of which brand?",
            "tell me the brand in the picture.",
            "which brand uses this sign?",
        ),
    ),
    "country": Wordings(
        "which country does this brand come from?",
        ("where was this brand founded?", "name the home country of this brand."),
        (
            "what is the home country of this logo?",
            "this brand comes from which country?",
            "in which country is this brand based?",
            "tell me the country of this brand.",
            "where is this brand from?",
        ),
    ),
    "product": Wordings(
        "what does this brand make?",
        ("which product is sold under this logo?", "name the product of this brand."),
        (
            "what product does this brand sell?",
            "this logo is found on which product?",
            "what can i buy from this brand?",
            "tell me what this brand makes.",
            "what kind of product is this brand known for?",
        ),
    ),
    "mascot": Wordings(
        "which animal is the mascot of this brand?",
        ("name the mascot of this brand.", "what animal stands for this brand?"),
        (
            "this brand has which animal as its mascot?",
            "what is the mascot of this logo?",
            "tell me the mascot animal of this brand.",
            "what animal does this brand use?",
            "which mascot belongs to this sign?",
        ),
    ),
    "founder": Wordings(
        "who founded this brand?",
        ("name the founder of this brand.", "this brand was started by whom?"),
        (
            "who is the founder of this brand?",
            "who started this brand?",
            "tell me who founded this brand.",
            "this logo belongs to a brand founded by whom?",
            "which person started this brand?",
        ),
    ),
}
ATTRIBUTES = tuple(QUESTIONS)

# What can be seen on a logo rather than known about it.
LOOK_QUESTIONS: dict[str, tuple[str, ...]] = {
    "badge_colour": (
        "what colour is the badge?",
        "which colour does the badge have?",
        "name the colour of the badge.",
    ),
    "badge_shape": (
        "what shape is the badge?",
        "which shape does the badge have?",
        "name the shape of the badge.",
    ),
    "line_colour": (
        "what colour are the lines?",
        "which colour do the lines have?",
        "name the colour of the lines.",
    ),
}
DIGIT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "digit": ("what digit is shown?", "which digit is written here?", "name the digit in the picture."),
    "digit_next": (
        "what is the shown digit plus one?",
        "which number comes after this digit?",
        "add one to the digit in the picture.",
    ),
}
SCENE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "scene_shape": (
        "what shape is {colour}?",
        "which shape is the {colour} one?",
        "name the shape of the {colour} object.",
    ),
    "scene_shape_at": (
        "what shape is at the {place}?",
        "which shape is on the {place} side?",
        "name the shape at the {place}.",
    ),
    "scene_colour": (
        "what colour is the {shape}?",
        "which colour does the {shape} have?",
        "name the colour of the {shape}.",
    ),
    "scene_place": (
        "where is the {shape}?",
        "on which side is the {shape}?",
        "name the place of the {shape}.",
    ),
    "scene_count": (
        "how many objects are there?",
        "what is the number of objects?",
        "count the objects in the picture.",
    ),
    "scene_size": (
        "what size is the {shape}?",
        "is the {shape} small or large?",
        "name the size of the {shape}.",
    ),
}

_CAPITALS = {
    "france": "paris",
    "japan": "tokyo",
    "brazil": "brasilia",
    "canada": "ottawa",
    "egypt": "cairo",
    "italy": "rome",
    "kenya": "nairobi",
    "spain": "madrid",
    "china": "beijing",
    "india": "delhi",
    "norway": "oslo",
    "peru": "lima",
    "poland": "warsaw",
    "greece": "athens",
    "sweden": "stockholm",
    "mexico": "mexicocity",
    "turkey": "ankara",
    "cuba": "havana",
    "chile": "santiago",
    "ireland": "dublin",
}
_OPPOSITES = (
    "hot cold, big little, fast slow, up down, day night, wet dry, old young, rich poor, open closed, "
    "hard soft, happy sad, early late, light dark, full empty, high low, long short, loud quiet, thick thin, "
    "sweet bitter, strong weak, clean dirty, near far, first last, win lose"
)
_CAPITAL_WORDINGS = (
    "what is the capital of {x}?",
    "name the capital city of {x}.",
    "{x} has which city as its capital?",
    "tell me the capital of {x}.",
)
_OPPOSITE_WORDINGS = (
    "what is the opposite of {x}?",
    "name the opposite of {x}.",
    "{x} is the opposite of what?",
    "tell me the opposite of {x}.",
)
_SUM_WORDINGS = (
    "what is {x} plus {y}?",
    "add {x} and {y}.",
    "{x} plus {y} is what?",
    "how much is {x} and {y}?",
)


@dataclass(frozen=True)
class TextFact:
    """A fact asked without an image: its ``family``, all its ``questions`` and the one ``answer``."""

    family: str
    questions: tuple[str, ...]
    answer: str


def text_facts() -> list[TextFact]:
    """Capitals, opposites (both ways) and sums of two digits; the same in every world."""
    facts = []
    for country, capital in _CAPITALS.items():
        facts.append(TextFact("capital", tuple(w.format(x=country) for w in _CAPITAL_WORDINGS), capital))
    for pair in _OPPOSITES.split(","):
        one, other = pair.split()
        for x, answer in ((one, other), (other, one)):
            facts.append(TextFact("opposite", tuple(w.format(x=x) for w in _OPPOSITE_WORDINGS), answer))
    for x in range(10):
        for y in range(10):
            facts.append(TextFact("sum", tuple(w.format(x=x, y=y) for w in _SUM_WORDINGS), str(x + y)))
    return facts


def brand_names() -> list[str]:
    """All possible brand names, 32 x 32 = 1,024."""
    return [opening + ending for opening in BRAND_OPENINGS for ending in BRAND_ENDINGS]


def answer_vocabulary(attribute: str) -> list[str]:
    """All possible answers of a logo attribute; raises ``KeyError`` naming the attributes there are."""
    words = {"country": COUNTRIES, "product": PRODUCTS, "mascot": ANIMALS, "founder": FOUNDERS}
    if attribute == "brand":
        return brand_names()
    if attribute not in words:
        raise KeyError(f"attribute={attribute!r} is unknown; choose one of {ATTRIBUTES}")
    return list(words[attribute])


def draw_facts(family_sizes: list[int], rng: np.random.Generator) -> list[dict[str, str]]:
    """Facts for consecutive look-alike families.

    Members of one family get pairwise different answers for every attribute (for brands: different openings
    and different endings), and no brand name is used twice in a world.
    """
    used: set[str] = set()
    facts: list[dict[str, str]] = []
    for size in family_sizes:
        drawn = {a: rng.permutation(answer_vocabulary(a))[:size].tolist() for a in ATTRIBUTES if a != "brand"}
        while True:
            openings, endings = rng.permutation(BRAND_OPENINGS)[:size], rng.permutation(BRAND_ENDINGS)[:size]
            drawn["brand"] = [str(o) + str(e) for o, e in zip(openings, endings, strict=True)]
            if used.isdisjoint(drawn["brand"]):
                break
        used.update(drawn["brand"])
        facts.extend({a: drawn[a][i] for a in ATTRIBUTES} for i in range(size))
    return facts
