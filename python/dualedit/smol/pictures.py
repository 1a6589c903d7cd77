"""Concepts that several artists drew: which pictures there are, who drew them, and what each artist is for.

Every set of pictures is an npm package that draws the same things (emoji, flags, brands) in its own style. A
concept is a thing that at least four sets draw. Artists have one role each: the model is trained on pictures
by *training* artists, choices are made on *validation* artists, and figures are reported on *test* artists,
whose pictures no training has seen. Two sets by one vendor never have different roles.
"""

import hashlib
import io
import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from .facts import country_facts, plain, read_countries, read_names

DRAWN = "2"  # changes when concepts, facts or drawing do, so that an older folder is made anew
FAMILIES = ("flags", "animals", "food", "places", "objects", "logos")
ROLES = ("training", "validation", "test")
SIDE = 224  # pixels of a rendered picture
MARGIN = 16  # pixels of white around it


@dataclass(frozen=True)
class PictureSet:
    """One npm package of pictures by one artist."""

    name: str
    artist: str
    draws: str  # emoji, flags or logos
    role: str
    licence: str


SETS = {
    s.name: s
    for s in (
        PictureSet("twemoji", "Twitter", "emoji", "training", "CC-BY-4.0"),
        PictureSet("noto", "Google", "emoji", "training", "Apache-2.0"),
        PictureSet("noto-v1", "Google", "emoji", "training", "Apache-2.0"),
        PictureSet("emojione", "Emoji One", "emoji", "training", "CC-BY-4.0"),
        PictureSet("emojione-v1", "Emoji One", "emoji", "training", "CC-BY-SA-4.0"),
        PictureSet("streamline-emojis", "Streamline", "emoji", "training", "CC-BY-4.0"),
        PictureSet("fxemoji", "Mozilla", "emoji", "validation", "Apache-2.0"),
        PictureSet("openmoji", "OpenMoji", "emoji", "training", "CC-BY-SA-4.0"),
        PictureSet("fluent-emoji-flat", "Microsoft", "emoji", "test", "MIT"),
        PictureSet("flag", "Panayiotis Lipiridis", "flags", "training", "MIT"),
        PictureSet("cif", "creativeLabs Łukasz Holeczek", "flags", "training", "CC0-1.0"),
        PictureSet("flagpack", "Yummygum", "flags", "validation", "MIT"),
        PictureSet("circle-flags", "HatScripts", "flags", "test", "MIT"),
        PictureSet("logos", "Gil Barbara", "logos", "training", "CC0-1.0"),
        PictureSet("devicon", "konpa", "logos", "validation", "MIT"),
        PictureSet("skill-icons", "tandpfun", "logos", "test", "MIT"),
    )
}
LEAST_SETS = 4  # sets that draw a thing, for it to be a concept
FAMILY_OF_GROUP = {
    "animals-nature": "animals",
    "food-drink": "food",
    "travel-places": "places",
    "activities": "objects",
    "objects": "objects",
}
NO_THINGS = {
    "time",
    "transport-sign",
    "warning",
}  # clock faces and signs: told apart by reading, not by sight
# What a set draws under a country's code is not always that country: languages (Arabic, Ido, Latin ...)
# and Equatorial Guinea for Guinea. Found by comparing the sets with each other, and looked at.
NOT_A_COUNTRY = {
    ("circle-flags", "ar"),
    ("circle-flags", "ie"),
    ("circle-flags", "io"),
    ("circle-flags", "la"),
    ("cif", "gn"),
}


@dataclass
class Concept:
    """One thing, the pictures of it, and what is true about it.

    Attributes:
        name: what the model is taught to say; unique among all concepts.
        family: one of `FAMILIES`.
        subgroup: the finer group of the data set, as `animal-bird`; the look-alikes of a thing share it.
        names: all names that count as right, from the data set's labels.
        facts: what is asked about it and the answer: `name` for things and logos; `country`, `capital`,
        `currency`,
            `language` and `continent` for flags.
        accepted: for each key of `facts`, all answers that count as right.
        pictures: the path of the picture by each set that draws it, in the order of `SETS`.
        seen: whether the model's training saw this concept. A few concepts are kept from it on purpose.
    """

    name: str
    family: str
    subgroup: str
    names: tuple[str, ...]
    facts: dict[str, str]
    accepted: dict[str, tuple[str, ...]]
    pictures: dict[str, Path] = field(default_factory=dict)
    seen: bool = True

    def by_role(self, role: str) -> dict[str, Path]:
        """The pictures by artists of one role: training, validation or test."""
        if role not in ROLES:
            raise ValueError(f"role={role!r}: one of {', '.join(ROLES)}")
        return {name: path for name, path in self.pictures.items() if SETS[name].role == role}


class IconSet:
    """An `@iconify-json` package: bodies of SVG by name."""

    def __init__(self, folder: Path):
        data = json.loads((folder / "icons.json").read_text("utf-8"))
        chars = folder / "chars.json"
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.width, self.height = data.get("width", 16), data.get("height", 16)
        self.chars = json.loads(chars.read_text("utf-8")) if chars.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.icons or name in self.aliases

    def drawing(self, name: str) -> str:
        """The body of an icon without the random names of its parts: equal for equal drawings."""
        while name not in self.icons:
            name = self.aliases[name]["parent"]
        return re.sub(r"SVG\w+", "", self.icons[name]["body"])

    def svg(self, name: str) -> tuple[str, float, float]:
        """The SVG text of an icon, its width and its height."""
        flips = False
        while name not in self.icons:
            alias = self.aliases[name]
            flips ^= bool(alias.get("hFlip"))
            name = alias["parent"]
        icon = self.icons[name]
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        left, top, body = icon.get("left", 0), icon.get("top", 0), icon["body"]
        if flips:
            body = f'<g transform="translate({width + 2 * left} 0) scale(-1 1)">{body}</g>'
        text = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
        )
        return text, width, height


def render(svg: str, width: float, height: float, side: int = SIDE, margin: int = MARGIN):
    """An SVG of `width` by `height` in the middle of a white picture, PIL RGB of `side` by `side`."""
    import resvg_py
    from PIL import Image

    zoom = (side - 2 * margin) / max(width, height)
    data = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=max(1, round(width * zoom)),
        height=max(1, round(height * zoom)),
        skip_system_fonts=True,
    )
    drawing = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    picture = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    picture.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return picture.convert("RGB")


def slug(text: str) -> str:
    """A name as file names have it: "Côte d'Ivoire" becomes "cote-divoire"."""
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "").replace("&", "and")).strip("-")


def _emoji_icon(name: str, icons: IconSet, row: dict, candidates: list[str]) -> str | None:
    """The icon of an emoji in a set: by its code points where the set lists them, by its names where not."""
    codes = (row["code"], row["code"].replace("-fe0f", ""))
    if icons.chars:
        return next((icons.chars[code] for code in codes if code in icons.chars), None)
    if name == "fxemoji":  # names of Unicode without spaces
        letters = [row["label"]]
        if len(row["emoji"].rstrip("\ufe0f")) == 1:
            letters.insert(0, unicodedata.name(row["emoji"][0], ""))
        candidates = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in letters]
    return next((text for text in candidates if text in icons), None)


def _flag_icon(name: str, icons: IconSet, code: str) -> str | None:
    icon = f"{code}-4x3" if name == "flag" else code
    return icon if icon in icons and (name, code) not in NOT_A_COUNTRY else None


def list_concepts(folders: dict[str, Path]) -> list[tuple[Concept, dict[str, str]]]:
    """All concepts of the packages, each with the name of its icon in every set that draws it.

    Args:
        folders: the unpacked npm packages: a name of `SETS`, `emojibase-data` and `world-countries` to a
        folder.
    """
    sets = {name: IconSet(folders[name]) for name in SETS}
    countries = read_countries(folders["world-countries"])
    rows = []
    for row in read_names(folders["emojibase-data"]):
        flag = row["subgroup"] == "country-flag"
        family = "flags" if flag else FAMILY_OF_GROUP.get(row["group"])
        if family is None or row["subgroup"] in NO_THINGS:
            continue
        candidates = [
            sets[name].chars[code]
            for name in ("twemoji", "openmoji", "noto", "fluent-emoji-flat")
            for code in (row["code"], row["code"].replace("-fe0f", ""))
            if code in sets[name].chars
        ]
        candidates = list(dict.fromkeys([*candidates, slug(row["label"])]))
        candidates += [f"flag-for-{c}" for c in candidates] + [
            f"flag-for-{c[5:]}" for c in candidates if c.startswith("flag-")
        ]
        country = None
        if flag:
            country = "".join(chr(int(x, 16) - 0x1F1E6 + ord("a")) for x in row["code"].split("-"))
            if country.upper() not in countries:
                continue
        icons = {}
        for name, icon_set in sets.items():
            hit = None
            if SETS[name].draws == "emoji":
                hit = _emoji_icon(name, icon_set, row, candidates)
            elif SETS[name].draws == "flags" and flag:
                hit = _flag_icon(name, icon_set, country)
            if hit:
                icons[name] = hit
        rows.append((row, family, countries.get(country.upper()) if country else None, icons))
    _drop_borrowed_flags(rows, sets)
    # A concept needs artists on both sides: to be known by, and to be asked with.
    rows = [row for row in rows if _enough(row[-1])]
    concepts = [_concept(row, family, country, icons, rows) for row, family, country, icons in rows]
    concepts += _brands(sets, {c.name.lower() for c, _ in concepts})
    keep_apart(concepts)
    return concepts


def _enough(icons: dict[str, str]) -> bool:
    roles = [SETS[name].role for name in icons]
    return len(icons) >= LEAST_SETS and roles.count("training") >= 2 and "test" in roles


def _drop_borrowed_flags(rows, sets: dict[str, IconSet]) -> None:
    """Take out, in place, the flags that a set draws exactly as a member of the United Nations has it.

    Some sets give territories the flag of the country that they belong to: no picture tells these apart.
    """
    members = {
        (name, sets[name].drawing(icon))
        for _, _, country, icons in rows
        if country is not None and country.get("unMember")
        for name, icon in icons.items()
    }
    for _, _, country, icons in rows:
        if country is None or country.get("unMember"):
            continue
        for name, icon in list(icons.items()):
            if (name, sets[name].drawing(icon)) in members:
                del icons[name]


def _concept(row, family, country, icons, rows) -> tuple[Concept, dict[str, str]]:
    if country is not None:
        facts, accepted = country_facts(country)
        concept = Concept(facts["country"], family, row["subgroup"], accepted["country"], facts, accepted)
        return concept, icons
    label = plain(row["label"])
    labels = [plain(text) for text in [row["label"], *row["labels"]]]
    taken = {plain(other["label"]) for other, *_ in rows if other is not row}
    names = []
    for text in labels:
        short = re.sub(r" face$", "", text)
        names += [short, text] if family == "animals" and short not in taken else [text]
    # A vendor's label that is another thing's own name is no name of this one.
    names = tuple(dict.fromkeys(n for n in names if n not in taken and re.search("[a-z]", n, re.I)))
    name = names[0] if names else label
    concept = Concept(name, family, row["subgroup"], names, {"name": name}, {"name": names})
    return concept, icons


def _brands(sets: dict[str, IconSet], taken: set[str]) -> list[tuple[Concept, dict[str, str]]]:
    """Brands that `logos` and at least one other set draw."""
    result = {}
    for name in sorted(set(sets["logos"].icons) | set(sets["logos"].aliases)):
        key = re.sub(r"-icon$", "", name)
        icons = {"logos": name}
        for other, endings in (
            ("devicon", ("", "-original")),
            ("skill-icons", ("", "-light", "-dark")),
        ):
            squeezed = (key, key.replace("-", ""))
            hit = next((k + e for k in squeezed for e in endings if k + e in sets[other]), None)
            if hit:
                icons[other] = hit
        if len(icons) < 2 or key in taken:
            continue
        if key in result and not name.endswith("-icon"):
            continue  # the sign without the word, where there are both
        text = key.replace("-", " ")
        concept = Concept(text, "logos", "brand", (text, key, key.replace("-", "")), {}, {})
        concept.names = tuple(dict.fromkeys(concept.names))
        concept.facts, concept.accepted = {"name": text}, {"name": concept.names}
        result[key] = (concept, icons)
    return list(result.values())


def draw_concepts(folders: dict[str, Path], target: Path, progress=None) -> int:
    """Render every picture of every concept, 224 pixels a side, and list the concepts in `concepts.json`.

    Args:
        folders: as `list_concepts` takes them.
        target: the folder to fill, `<set>/<concept>.png` and `concepts.json`. Pictures that are there are
        kept.
        progress: called with a line of text now and then.

    Returns:
        The number of pictures.
    """
    sets = {name: IconSet(folders[name]) for name in SETS}
    concepts = list_concepts(folders)
    total = sum(len(icons) for _, icons in concepts)
    done, rows = 0, []
    for concept, icons in concepts:
        files = {}
        for name, icon in icons.items():
            file = target / name / f"{slug(concept.family)}-{slug(concept.name)}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                render(*sets[name].svg(icon)).save(part, format="png")
                part.replace(file)
            files[name] = file.relative_to(target).as_posix()
            done += 1
            if progress and done % 2000 == 0:
                progress(f"  {done} of {total} pictures drawn")
        row = {
            key: getattr(concept, key)
            for key in ("name", "family", "subgroup", "names", "facts", "accepted", "seen")
        }
        rows.append({**row, "pictures": files})
    part = target / "concepts.part"
    part.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    part.replace(target / "concepts.json")
    return done


def read_concepts(folder: Path) -> list[Concept]:
    """The concepts of a folder that `draw_concepts` filled."""
    rows = json.loads((folder / "concepts.json").read_text("utf-8"))
    for row in rows:
        row["names"] = tuple(row["names"])
        row["accepted"] = {key: tuple(values) for key, values in row["accepted"].items()}
        row["pictures"] = {name: folder / file for name, file in row["pictures"].items()}
    return [Concept(**row) for row in rows]


def keep_apart(concepts: list[tuple[Concept, dict[str, str]]], every: int = 16) -> None:
    """Mark about every sixteenth concept, by the hash of its name, as one that training does not see."""
    for concept, _ in concepts:
        digest = hashlib.sha256(concept.name.encode()).digest()
        concept.seen = int.from_bytes(digest[:4], "big") % every != 0
