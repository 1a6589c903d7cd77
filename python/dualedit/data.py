"""The shapes of an edit and of the questions that measure it.

One schema for every data set: a request, the probes that must change with it (generality, portability) and
the probes that must not (locality). An image is given as a PIL image, a path, the bytes of an image file, or
None for a text-only question. Paths and bytes are opened each time `.image` is asked for and never kept, so
thousands of samples hold no pictures in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from PIL.Image import Image

from .models.images import ImageSource, Picture, image_source, open_image, shown

Given = Picture | Mapping[str, Any] | None
_T = TypeVar("_T")


class _LazyImage:
    """Keeps an image as it was given and opens it whenever it is asked for."""

    def __get__(self, instance: object, owner: type | None = None) -> Image | None:
        return open_image(instance.__dict__["image"])

    def __set__(self, instance: object, image: Given) -> None:
        instance.__dict__["image"] = image_source(image)


def _lazy(cls: type[_T]) -> type[_T]:
    """Have a dataclass open its `image` when it is asked for; put on after `dataclass`, to be no default."""
    setattr(cls, "image", _LazyImage())  # noqa: B010 (mypy knows no attribute of a class to come)
    return cls


class _Pictured:
    """Printing, comparing and hashing by what was given, so that none of them opens a file.

    `dataclasses.replace` reads `.image`; to change a prompt and leave the file closed, build a new object
    from `image_source`.
    """

    @property
    def image_source(self) -> ImageSource:
        """The image as it was given: a PIL image, a path as text, bytes, or None."""
        return self.__dict__["image"]

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        rest = "".join(f", {name}={value!r}" for name, value in self.__dict__.items() if name != "image")
        return f"{type(self).__name__}(image={shown(self.image_source)}{rest})"


@_lazy
@dataclass(frozen=True, eq=False, repr=False)
class EditRequest(_Pictured):
    """One fact to correct: asked `prompt` about `image`, the model is to answer `target`."""

    image: Image | None
    prompt: str
    target: str

    if TYPE_CHECKING:  # more is taken than given back

        def __init__(self, image: Given, prompt: str, target: str) -> None: ...


@_lazy
@dataclass(frozen=True, eq=False, repr=False)
class Probe(_Pictured):
    """One question; `answer` is what the data set holds to be right, or None if it says nothing.

    `fact` names the (entity, family) that a question is about, where that could be an edited one: with many
    edits stored, a look-alike may have an edit of its own. `kind` splits a figure further: beside "v_gen",
    "v_gen_artist" is given of the probes of kind "artist".
    """

    image: Image | None
    prompt: str
    answer: str | None = None
    fact: tuple[int, str] | None = None
    kind: str = ""

    if TYPE_CHECKING:

        def __init__(
            self, image: Given, prompt: str, answer: str | None = None, fact: tuple[int, str] | None = None
        ) -> None: ...


@dataclass(frozen=True)
class EditSample:
    """An edit with everything that measures it.

    Attributes:
        request: the edit itself.
        generality: probes that must give the request's target; keys "t_gen" (other wordings, same image) and
            "v_gen" (same question, other images of the same thing).
        locality: probes whose answer must stay what it was; keys "t_loc" (text only), "m_loc" (unrelated
            image), "hard_image" (same question, a look-alike) and "hard_question" (same thing, another
            question).
        rephrases: wordings of the question an editor may use while editing; never the wordings of "t_gen".
        family: which attribute the fact is about.
        entity: number of the entity the fact is about.
        portability: probes about what follows from the edit, whose own `answer` is expected; keys by data
            set, such as "1-hop" (see `dualedit.datasets`).
        companions: further edits that some portability probes presume.
        id: the sample's name in its data set.
        base_answer: what the data set says the unedited model answers, or None.
    """

    request: EditRequest
    generality: dict[str, list[Probe]]
    locality: dict[str, list[Probe]]
    rephrases: list[str] = field(default_factory=list)
    family: str = ""
    entity: int = -1
    portability: dict[str, list[Probe]] = field(default_factory=dict)
    companions: list[EditRequest] = field(default_factory=list)
    id: str = ""
    base_answer: str | None = None

    @property
    def fact(self) -> tuple[int, str] | None:
        """(entity, family), or None where the entity has no number."""
        return None if self.entity < 0 else (self.entity, self.family)
