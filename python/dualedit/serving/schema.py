"""What requests and answers of the HTTP interface look like."""

from __future__ import annotations

import math
import time
import uuid
from typing import Any

from pydantic import BaseModel, Field

from ..editing import Edit
from ..editor import Explanation
from .batches import Answer


class ChatRequest(BaseModel):
    """OpenAI's chat completion request, as far as it means something here; other fields are ignored.

    Answers are greedy: temperature, top_p and seed change nothing.
    """

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    tools: list[Any] | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None


class Question(BaseModel):
    """A picture (a data URL, or null) and a question about it."""

    image: str | None = None
    prompt: str


class NewEdit(Question):
    """A correction; `rephrases`, `negatives`, `keep_failed` are `Editor.edit`'s, `who` is noted with it."""

    target: str
    rephrases: list[str] = Field(default_factory=list, max_length=16)
    negatives: list[str] = Field(default_factory=list, max_length=16)
    keep_failed: bool = False
    who: str = Field("", max_length=80)


class By(BaseModel):
    """Who asks for a change."""

    who: str = Field("", max_length=80)


def edit_json(edit: Edit) -> dict[str, Any]:
    """A stored edit."""
    picture = None if edit.image_sha256 is None else f"/v1/edits/{edit.id}/picture"
    return {
        "object": "edit", "id": edit.id, "prompt": edit.prompt, "target": edit.target, "answer": edit.answer,
        "failed": edit.failed, "radius": edit.radius, "probability": edit.probability,
        "seconds": edit.seconds, "created": edit.created, "who": edit.author, "enabled": edit.enabled,
        "method": edit.method, "picture": picture, "replaces": [old["id"] for old in edit.replaces],
    }  # fmt: skip


def explanation_json(found: Explanation) -> dict[str, Any]:
    """Which edit answers, or which is nearest and how far away."""
    far = found.distance if math.isfinite(found.distance) else None
    nearest = None if found.edit is None else found.edit.id
    return {
        "fired": found.fired, "nearest": nearest, "distance": far, "radius": found.radius, "why": found.why,
    }  # fmt: skip


def new_id() -> str:
    """The id of a completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion_json(model: str, answer: Answer) -> dict[str, Any]:
    """A whole chat completion."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    return {
        "id": new_id(), "object": "chat.completion", "created": int(time.time()), "model": model,
        "choices": [choice], "usage": usage_json(answer), "dualedit": {"edit": answer.edit},
    }  # fmt: skip


def usage_json(answer: Answer) -> dict[str, int]:
    """Tokens of a question and its answer."""
    total = answer.prompt_tokens + answer.tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": total,
    }


def chunk_json(
    name: str, model: str, delta: dict[str, Any] | None, finish: str | None = None
) -> dict[str, Any]:
    """A piece of a streamed chat completion; `delta` None: one without choices, for the usage."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {
        "id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": model,
        "choices": choices,
    }  # fmt: skip
