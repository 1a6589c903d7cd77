"""Concepts from packages of pictures: names, facts, artists' roles, drawing that goes on where it stopped."""

import json

import pytest
from dualedit.smol import pictures
from dualedit.smol.facts import country_facts, plain
from dualedit.smol.pictures import SETS, Concept, IconSet
from PIL import Image

KENYA = {
    "cca2": "KE",
    "name": {"common": "Kenya", "official": "Republic of Kenya"},
    "capital": ["Nairobi"],
    "region": "Africa",
    "subregion": "Eastern Africa",
    "currencies": {"KES": {"name": "Kenyan shilling"}},
    "languages": {"eng": "English", "swa": "Swahili"},
}
CHILE = {
    **KENYA,
    "cca2": "CL",
    "region": "Americas",
    "subregion": "South America",
    "languages": {},
    "currencies": {},
}


def test_a_country_answers_with_its_usual_language_and_accepts_the_others():
    facts, accepted = country_facts(KENYA)
    assert facts == {
        "country": "Kenya",
        "capital": "Nairobi",
        "currency": "Kenyan shilling",
        "language": "Swahili",
        "continent": "Africa",
    }
    assert accepted["language"] == ("Swahili", "English")
    assert accepted["country"] == ("Kenya", "Republic of Kenya")


def test_what_a_country_does_not_have_is_not_asked_and_the_americas_are_two():
    facts, _ = country_facts(CHILE)
    assert "language" not in facts and "currency" not in facts
    assert facts["continent"] == "South America"
    assert country_facts({**CHILE, "subregion": "Caribbean"})[0]["continent"] == "North America"
    assert "continent" not in country_facts({**CHILE, "region": "Antarctic"})[0]


def test_labels_become_words():
    assert plain("keycap_1 (symbol)") == "keycap 1"
    assert plain("women’s  hat") == "women's hat"


def test_no_vendor_has_two_roles():
    roles = {}
    for s in SETS.values():
        roles.setdefault(s.artist, set()).add(s.role)
    assert all(len(found) == 1 for found in roles.values())
    for draws in ("emoji", "flags", "logos"):
        assert {s.role for s in SETS.values() if s.draws == draws} == set(pictures.ROLES)


def test_pictures_by_role(tmp_path):
    files = {name: tmp_path / name for name in ("twemoji", "fxemoji", "fluent-emoji-flat")}
    concept = Concept("cat", "animals", "animal-mammal", ("cat",), {"name": "cat"}, {"name": ("cat",)}, files)
    assert list(concept.by_role("training")) == ["twemoji"]
    assert list(concept.by_role("validation")) == ["fxemoji"]
    assert list(concept.by_role("test")) == ["fluent-emoji-flat"]
    with pytest.raises(ValueError, match="role='held': one of training"):
        concept.by_role("held")


@pytest.fixture
def folders(tmp_path):
    """Packages with one animal that six sets draw and another that two sets draw."""
    cat, dog = '<circle id="cat"/>', '<circle id="dog"/>'
    result = {}
    for s in SETS.values():
        folder = tmp_path / "packages" / s.name
        folder.mkdir(parents=True)
        icons = {}
        if s.draws == "emoji":
            icons["cat"] = {"body": cat}
            if s.name in ("twemoji", "noto"):
                icons["dog"] = {"body": dog}
        data = {
            "width": 32,
            "height": 32,
            "icons": icons,
            "aliases": {"tac": {"parent": "cat", "hFlip": True}},
        }
        (folder / "icons.json").write_text(json.dumps(data if icons else {"icons": {}}))
        result[s.name] = folder
    names = tmp_path / "packages" / "emojibase-data"
    (names / "en" / "shortcodes").mkdir(parents=True)
    (names / "meta").mkdir()
    rows = [
        {"label": label, "hexcode": code, "emoji": chr(int(code, 16)), "group": 3, "subgroup": 34}
        for label, code in (("cat", "1F408"), ("dog", "1F415"))
    ]
    (names / "en" / "data.json").write_text(json.dumps(rows))
    groups = {"groups": {"3": "animals-nature"}, "subgroups": {"34": "animal-mammal"}}
    (names / "meta" / "groups.json").write_text(json.dumps(groups))
    for vendor in ("cldr", "github", "emojibase", "joypixels", "iamcal"):
        text = {"1F408": ["cat2", "house_cat"]} if vendor == "github" else {}
        (names / "en" / "shortcodes" / f"{vendor}.json").write_text(json.dumps(text))
    countries = tmp_path / "packages" / "world-countries"
    countries.mkdir()
    (countries / "countries.json").write_text("[]")
    return {**result, "emojibase-data": names, "world-countries": countries}


def test_a_concept_is_what_enough_sets_draw(folders):
    (concept, icons), *others = pictures.list_concepts(folders)
    assert others == []
    assert (concept.name, concept.family, concept.subgroup) == ("cat", "animals", "animal-mammal")
    assert "house cat" in concept.names and concept.accepted == {"name": concept.names}
    assert set(icons) == {s.name for s in SETS.values() if s.draws == "emoji"}


def test_a_flag_that_a_territory_borrows_is_left_out(folders):
    flags = {"ke": "kenya", "io": "ocean", "re": "kenya"}  # Reunion's flag is drawn as Kenya's
    for s in SETS.values():
        if s.draws == "flags":
            suffix = "-4x3" if s.name == "flag" else ""
            icons = {code + suffix: {"body": body} for code, body in flags.items()}
            (folders[s.name] / "icons.json").write_text(json.dumps({"icons": icons}))
    territory = {**KENYA, "unMember": False}
    names = {"RE": "Reunion", "IO": "Ocean"}
    rows = [{**KENYA, "unMember": True}]
    rows += [{**territory, "cca2": code, "name": {"common": n, "official": n}} for code, n in names.items()]
    (folders["world-countries"] / "countries.json").write_text(json.dumps(rows))
    file = folders["emojibase-data"] / "en" / "data.json"
    emoji = [
        {"label": f"flag: {code}", "hexcode": code, "emoji": "", "group": 9, "subgroup": 98}
        for code in ("1F1F0-1F1EA", "1F1F7-1F1EA", "1F1EE-1F1F4")
    ]
    file.write_text(json.dumps(emoji))
    groups = {"groups": {"9": "flags"}, "subgroups": {"98": "country-flag"}}
    (folders["emojibase-data"] / "meta" / "groups.json").write_text(json.dumps(groups))
    concepts = dict((c.name, icons) for c, icons in pictures.list_concepts(folders))
    # All sets draw Kenya; Reunion is Kenya in all; circle-flags has a language where the Ocean should be.
    assert set(concepts) == {"Kenya"}
    assert set(concepts["Kenya"]) == {"flag", "cif", "flagpack", "circle-flags"}


def test_a_mirrored_alias_is_mirrored(folders):
    icons = IconSet(folders["twemoji"])
    assert "tac" in icons and "tic" not in icons
    assert "scale(-1 1)" in icons.svg("tac")[0] and "scale(-1 1)" not in icons.svg("cat")[0]


def test_drawing_goes_on_where_it_stopped(folders, tmp_path, monkeypatch):
    drawn = []

    def render(svg, width, height):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(svg)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(pictures, "render", render)
    target = tmp_path / "pictures"
    with pytest.raises(KeyboardInterrupt):
        pictures.draw_concepts(folders, target)
    assert not (target / "concepts.json").exists() and len(list(target.rglob("*.png"))) == 3
    monkeypatch.setattr(pictures, "render", lambda *svg: drawn.append(svg) or Image.new("RGB", (8, 8)))
    count = pictures.draw_concepts(folders, target)
    assert count == len(drawn) == len(list(target.rglob("*.png")))  # none was drawn twice
    (concept,) = pictures.read_concepts(target)
    assert all(path.exists() for path in concept.pictures.values())
    assert list(concept.pictures) == [name for name in SETS if name in concept.pictures]
