"""A data set for facts of one's own: the pipeline of BalancEdit's appendix, with generators to choose from.

rows = read_source("rows.jsonl")                              # image, question, answer, new_answer
generators = [TextGenerator(Endpoint(url, "name")), PictureFolder("more")]
built = build(rows, generators, Wanted(), Answerer(model, processor), Cache("cache.jsonl"), "pictures")
to_jsonl(built.samples, "facts.jsonl")
"""

from .answering import Answerer
from .building import Built, Drop, Wanted, build, estimate
from .cache import Cache
from .checking import check_facts, facts_schema, stats_of
from .from_samples import FromSamples, write_source
from .generators import KINDS, Cost, Generator, GeneratorFailed, Piece
from .language import Endpoint, LocalTextModel, TextGenerator
from .pictures import DiffusersPictures, Neighbours, PictureFolder
from .review import read_decisions, render_review, without_rejected
from .rows import SourceRow, read_source

__all__ = [
    "KINDS",
    "Answerer",
    "Built",
    "Cache",
    "Cost",
    "DiffusersPictures",
    "Drop",
    "Endpoint",
    "FromSamples",
    "Generator",
    "GeneratorFailed",
    "LocalTextModel",
    "Neighbours",
    "Piece",
    "PictureFolder",
    "SourceRow",
    "TextGenerator",
    "Wanted",
    "build",
    "check_facts",
    "estimate",
    "facts_schema",
    "read_decisions",
    "read_source",
    "render_review",
    "stats_of",
    "without_rejected",
    "write_source",
]
