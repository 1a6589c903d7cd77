"""What is known about the things: names from `emojibase-data`, countries from `world-countries`."""

import json
import re
from pathlib import Path

CONTINENTS = {"Africa", "Asia", "Europe", "Oceania"}

# `world-countries` sorts a country's languages by code. Where the first is not the one that most people would
# name, a flag's answer is this one; the others are accepted, too.
USUAL_LANGUAGE = {
    "AF": "Dari", "BE": "Dutch", "BI": "Kirundi", "BO": "Spanish", "BW": "Tswana", "BY": "Belarusian",
    "CA": "English", "CH": "German", "CK": "English", "DJ": "French", "ER": "Tigrinya", "FI": "Finnish",
    "FJ": "English", "GQ": "Spanish", "HT": "French", "IE": "English", "IL": "Hebrew", "IN": "Hindi",
    "KE": "Swahili", "KG": "Kyrgyz", "KI": "English", "KZ": "Kazakh", "LK": "Sinhala", "LS": "Sotho",
    "LU": "Luxembourgish", "MG": "Malagasy", "MH": "Marshallese", "MT": "Maltese", "MW": "Chewa",
    "NR": "Nauru", "NZ": "English", "PE": "Spanish", "PH": "Filipino", "PK": "Urdu", "PS": "Arabic",
    "PW": "Palauan", "PY": "Spanish", "RW": "Kinyarwanda", "SG": "English", "SO": "Somali", "SZ": "Swazi",
    "TD": "French", "TJ": "Tajik", "TO": "Tongan", "TZ": "Swahili", "UG": "English", "US": "English",
    "VU": "Bislama", "WS": "Samoan", "ZA": "English", "ZW": "English",
}  # fmt: skip


def continent(country: dict) -> str | None:
    """The continent of a row of `world-countries`, with the Americas as two."""
    if country["region"] in CONTINENTS:
        return country["region"]
    if country["region"] == "Americas":
        return "South America" if country["subregion"] == "South America" else "North America"
    return None


def country_facts(country: dict) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Answers about one country, and what else counts as right.

    Args:
        country: a row of `world-countries`.

    Returns:
        `(facts, accepted)`: `facts` maps country, capital, currency, language and continent to the answer
        that is trained, `accepted` maps the same keys to all answers that count as right. A key that the
        data set does not have is missing.
    """
    code = country["cca2"]
    languages = list((country["languages"] or {}).values())
    usual = USUAL_LANGUAGE.get(code)
    if usual in languages:
        languages.insert(0, languages.pop(languages.index(usual)))
    accepted = {
        "country": [country["name"]["common"], country["name"]["official"]],
        "capital": list(country["capital"]),
        "currency": [value["name"] for value in (country["currencies"] or {}).values()],
        "language": languages,
        "continent": [continent(country)] if continent(country) else [],
    }
    accepted = {key: tuple(values) for key, values in accepted.items() if values}
    return {key: values[0] for key, values in accepted.items()}, accepted


def read_countries(folder: Path) -> dict[str, dict]:
    """The rows of `world-countries`, by two-letter code; `folder` holds the package's `countries.json`."""
    rows = json.loads((folder / "countries.json").read_text("utf-8"))
    return {row["cca2"]: row for row in rows if row["capital"]}


def read_names(folder: Path) -> list[dict]:
    """One row for each emoji of `emojibase-data`: code, label, group, subgroup and the vendors' labels."""
    rows = json.loads((folder / "en" / "data.json").read_text("utf-8"))
    groups = json.loads((folder / "meta" / "groups.json").read_text("utf-8"))
    vendors = [
        json.loads((folder / "en" / "shortcodes" / f"{name}.json").read_text("utf-8"))
        for name in ("cldr", "github", "emojibase", "joypixels", "iamcal")
    ]
    result = []
    for row in rows:
        if "group" not in row:
            continue
        labels = [row["label"]]
        for vendor in vendors:
            codes = vendor.get(row["hexcode"], [])
            labels += [codes] if isinstance(codes, str) else codes
        result.append(
            {
                "code": row["hexcode"].lower(),
                "emoji": row["emoji"],
                "label": row["label"],
                "group": groups["groups"][str(row["group"])],
                "subgroup": groups["subgroups"][str(row["subgroup"])],
                "labels": list(dict.fromkeys(plain(label) for label in labels)),
            }
        )
    return result


def plain(label: str) -> str:
    """A label as words: no underscores, brackets or typographic apostrophes."""
    label = re.sub(r"\s*\(.*?\)", "", label).replace("’", "'").replace("_", " ").replace("-", " ")
    return re.sub(r"\s+", " ", label).strip()
