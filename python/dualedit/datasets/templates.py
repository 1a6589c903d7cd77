"""How a data set's questions are worded: as a user asks them, or as a paper's code does.

A paper's wording matters when its figures are to be compared: its models continue a text ("... The answer
is:"), chat models answer a question. To ask LLaVA as the paper does, combine "dualedit" with
`Editor(model, processor, template="<image>\\n{prompt}")`, which leaves the chat template out.
"""

from __future__ import annotations

from dataclasses import dataclass

NQ_PREFIX = "nq question:"


@dataclass(frozen=True)
class PromptTemplate:
    """Wordings by kind of question; {prompt} stands for the question.

    Attributes:
        name: what reports call it.
        image: questions about an image.
        text: questions without one.
        caption: E-IC's edits and their rephrasings, which are beginnings of captions ("a photo of").
        keep_prefix: whether the "nq question: " that opens EasyEdit's text questions stays.
    """

    name: str
    image: str = "{prompt}"
    text: str = "{prompt}"
    caption: str = "{prompt}"
    keep_prefix: bool = False

    def apply(self, prompt: str, kind: str) -> str:
        """The wording of a question of this kind: "image", "text", "caption", or "loc", EasyEdit's text
        question."""
        if kind == "loc":
            kind = "text"
            if not self.keep_prefix and prompt.lower().startswith(NQ_PREFIX):
                prompt = prompt[len(NQ_PREFIX) :].lstrip()
        # Not str.format: questions may hold braces.
        return getattr(self, kind).replace("{prompt}", prompt)


TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        # The default: what a user would type, for chat models.
        PromptTemplate("plain"),
        # As the file has it, "nq question: " included. VLKEB and MMKE-Bench evaluate so.
        PromptTemplate("raw", keep_prefix=True),
        # The wording of DualEdit's and VisEdit's published code for E-VQA and E-IC.
        PromptTemplate("dualedit", "{prompt} The answer is:", "{prompt}?", keep_prefix=True),
        # EasyEdit's.
        PromptTemplate("easyedit", "Question: {prompt} Short answer: ", keep_prefix=True),
    )
}


def find_template(prompt_template: str | None) -> PromptTemplate:
    """A template by name, or one that words every question the same way.

    Args:
        prompt_template: a name of `TEMPLATES`, a text with {prompt} in it, or None for "plain".

    Raises:
        ValueError: neither.
    """
    if prompt_template is None:
        return TEMPLATES["plain"]
    if prompt_template in TEMPLATES:
        return TEMPLATES[prompt_template]
    if not isinstance(prompt_template, str) or "{prompt}" not in prompt_template:
        raise ValueError(
            f"prompt_template={prompt_template!r} is unknown: choose one of {tuple(TEMPLATES)}, or pass a "
            "text with {prompt} where the question goes."
        )
    return PromptTemplate(prompt_template, prompt_template, prompt_template, prompt_template)
