"""The shapes of an edit and of the questions that measure it.

One schema for every data set: a request, the probes that must change with it (generality) and the probes
that must not (locality). Images are PIL images or None for text-only questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL.Image import Image


@dataclass(frozen=True)
class EditRequest:
    """One fact to correct: asked `prompt` about `image`, the model is to answer `target`."""

    image: Image | None
    prompt: str
    target: str


@dataclass(frozen=True)
class Probe:
    """One question; `answer` is the answer that the data set holds to be right, or None if it says nothing."""

    image: Image | None
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditSample:
    """An edit with everything that measures it.

    Attributes:
        request: the edit itself.
        generality: probes that must give the request's target; keys "t_gen" (other wordings, same image) and
            "v_gen" (same question, other images of the same thing).
        locality: probes whose answer must stay what it was; keys "t_loc" (text only), "m_loc" (unrelated image),
            "hard_image" (same question, a look-alike) and "hard_question" (same thing, another question).
        rephrases: wordings of the question an editor may use while editing; never the wordings of "t_gen".
        family: which attribute the fact is about.
        entity: number of the entity the fact is about.
    """

    request: EditRequest
    generality: dict[str, list[Probe]]
    locality: dict[str, list[Probe]]
    rephrases: list[str] = field(default_factory=list)
    family: str = ""
    entity: int = -1
