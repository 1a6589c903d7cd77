"""Samples from EasyEdit's rows (E-VQA, E-IC), and from VLKEB and MMKE-Bench, which extend them."""

from __future__ import annotations

import dataclasses

from ..data import EditRequest, EditSample, Probe
from ..models.images import ImageSource
from .rows import Row


def easyedit_sample(row: Row, name: str, caption: bool = False) -> EditSample:
    """A sample of the eleven fields that all four data sets share.

    Args:
        name: the sample's id.
        caption: whether src and rephrase begin a caption (E-IC) rather than ask.
    """
    kind = "caption" if caption else "image"
    prompt, target, image = row.prompt("src", kind), row.text("alt"), row.image("image")
    return EditSample(
        EditRequest(image, prompt, target),
        generality={
            "t_gen": [Probe(image, row.prompt("rephrase", kind), target)],
            "v_gen": [Probe(row.image("image_rephrase"), prompt, target)],
        },
        locality={
            "t_loc": [Probe(None, row.prompt("loc", "loc"), row.optional_text("loc_ans"))],
            "m_loc": [Probe(row.image("m_loc"), row.prompt("m_loc_q"), row.optional_text("m_loc_a"))],
        },
        id=name,
        base_answer=row.optional_text("pred"),
    )


def evqa_sample(row: Row, name: str) -> EditSample:
    """A sample of E-VQA."""
    return easyedit_sample(row, name)


def eic_sample(row: Row, name: str) -> EditSample:
    """A sample of E-IC."""
    return easyedit_sample(row, name, caption=True)


def vlkeb_sample(row: Row, name: str) -> EditSample:
    """A sample of VLKEB, whose portability is asked about the edit's image."""
    sample = easyedit_sample(row, name)
    _add_ports(sample, row, sample.request.image_source)
    return sample


def mmke_sample(row: Row, name: str) -> EditSample:
    """A sample of MMKE-Bench."""
    sample = easyedit_sample(row, name)
    request, other = sample.request, sample.generality["v_gen"][0].image_source
    for mark in _numbered(row, "rel"):
        probe = Probe(None, row.prompt(f"rel{mark}", "text"), _answer(row, "rel", mark))
        sample.portability.setdefault("t_rel", []).append(probe)
    for mark in _numbered(row, "m_rel"):
        prompt, answer = row.prompt(f"m_rel{mark}"), _answer(row, "m_rel", mark)
        # Questions about the rephrased image have a wording of their own where there is but one of them.
        own = not mark and row.optional_text("image_rephrase_question")
        again = row.prompt("image_rephrase_question") if own else prompt
        sample.portability.setdefault("m_rel", []).append(Probe(request.image_source, prompt, answer))
        sample.portability.setdefault("v_rel", []).append(Probe(other, again, answer))
    hop = row.image("one_hop_img") if row.optional_text("one_hop_img") else request.image_source
    _add_ports(sample, row, hop)
    return dataclasses.replace(sample, family=row.text("knowledge_type"))


def _numbered(row: Row, stem: str) -> list[str]:
    """The endings of a field that is there once ("rel") or numbered ("rel_1", "rel_2", ...)."""
    marks = ["", *(f"_{n}" for n in range(1, 10))]
    return [mark for mark in marks if row.has(stem + mark)]


def _answer(row: Row, stem: str, mark: str) -> str:
    """An answer, in either of the two spellings that the files have: rel_ans_1 and rel_1_ans."""
    spellings = (f"{stem}_ans{mark}", f"{stem}{mark}_ans")
    for key in spellings:
        if row.has(key):
            return row.text(key)
    raise row.error(spellings[0], f"is missing, and so is {spellings[1]!r}: {stem + mark!r} needs an answer.")


def _add_ports(sample: EditSample, row: Row, image: ImageSource) -> None:
    for port in row.children("port_new"):
        if port.has("port_edit_q"):
            second = EditRequest(None, port.prompt("port_edit_q", "text"), port.text("port_edit_a"))
            sample.companions.append(second)
            probe = Probe(image, port.prompt("port_q"), port.text("port_a"))
            sample.portability.setdefault("edit_onehop", []).append(probe)
        else:
            pair = port.child("Q&A", port.needed("Q&A"))
            probe = Probe(image, pair.prompt("Question"), pair.text("Answer"))
            sample.portability.setdefault(port.optional_text("port_type") or "port", []).append(probe)
