"""Questions from a language model: a local one, or an endpoint that speaks OpenAI's chat interface."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .cache import Cache
from .generators import Cost, GeneratorFailed, Piece
from .rows import SourceRow

ASKS = {
    "rephrases": (
        "Rewrite this question about a picture in {count} different ways. Each must mean the same and have "
        "the same "
        "answer. Do not answer it.{thing}\nQuestion: {question}\nWrite one question a line, without numbers."
    ),
    "near_questions": (
        "This question is asked about a picture.{thing}\nQuestion: {question}\nWrite {count} other short "
        "questions "
        "about the same picture that ask for something else. Write one question a line, without numbers."
    ),
    "texts": (
        "Write {count} short questions of general knowledge that need no picture and have one short answer. "
        "They "
        "must have nothing to do with this one: {question}\nWrite one question a line, without numbers."
    ),
}
_OUT_TOKENS = 20  # of a question, about
_WAITS = (1.0, 2.0, 4.0)  # seconds before a request that failed is made again
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class TextModel(Protocol):
    """Completes a text."""

    name: str

    def complete(self, prompt: str, tokens: int, seed: int) -> str:
        """The model's answer to a prompt, of at most so many tokens."""


class TextGenerator:
    """Rephrasings, near questions and unrelated ones by a language model.

    Args:
        model: `Endpoint` or `LocalTextModel`.
    """

    makes = frozenset(ASKS)

    def __init__(self, model: TextModel):
        self.model = model
        self.name = model.name
        self.settings = Cache.key(*ASKS.items())

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """One request, its tokens by the number of letters."""
        return Cost(1, len(_asked(kind, row, count)) // 4 + 8, count * _OUT_TOKENS)

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """The lines of the model's answer, as questions."""
        answer = self.model.complete(_asked(kind, row, count), 2 * count * _OUT_TOKENS + 20, attempt)
        return [Piece(prompt=line) for line in lines_of(answer)[:count]]


def _asked(kind: str, row: SourceRow, count: int) -> str:
    thing = f" The picture shows {row.thing}." if row.thing else ""
    return ASKS[kind].format(count=count, question=row.question, thing=thing)


def lines_of(answer: str) -> list[str]:
    """The questions in a model's answer: its lines without numbers, bullets and quotes, each once."""
    found = []
    for line in answer.splitlines():
        line = re.sub(r"^\s*(?:[-*•]|\(?\d+[.):])\s*", "", line).strip().strip("\"'“”").strip()
        if len(line.split()) >= 2 and not line.endswith(":"):
            found.append(line)
    return list(dict.fromkeys(found))


class Endpoint:
    """An OpenAI-compatible chat endpoint over plain HTTP.

    Args:
        url: up to and without "/chat/completions", such as http://localhost:8000/v1.
        model: its name there.
        key_variable: environment variable that holds the key; not set: no key is sent.
        timeout: seconds for one request.
        wait: called with the seconds to wait before a request is made again.
    """

    def __init__(
        self, url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"url={url!r}: pass the address of an endpoint, such as http://localhost:8000/v1."
            )
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.timeout, self.wait = timeout, wait
        self.name = f"endpoint {model}"
        self.used = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def complete(self, prompt: str, tokens: int, seed: int) -> str:
        """The first choice's text.

        Raises:
            GeneratorFailed: it refuses, cannot be reached after three more tries, or answers something else.
        """
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens,
            "temperature": 0.7, "seed": seed,
        }  # fmt: skip
        found = self._post(json.dumps(body).encode())
        try:
            text = found["choices"][0]["message"]["content"]
            usage = found.get("usage") or {}
            self.used["requests"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.used[name] += int(usage.get(name) or 0)
            return str(text or "")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise GeneratorFailed(f"{self.url} answers without choices[0].message.content.") from error

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        for waits in (*_WAITS, None):
            request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read().decode("utf-8"))
            except urllib.error.HTTPError as error:
                told, again = f"HTTP {error.code} {error.reason}", error.code in _AGAIN
                after = error.headers.get("Retry-After") if error.headers else None
                waits = float(after) if waits is not None and after and after.isdigit() else waits
            except (OSError, ValueError) as error:  # no connection, a timeout, half an answer
                told, again = str(getattr(error, "reason", error)), True
            if waits is None or not again:
                raise GeneratorFailed(f"{self.url} fails: {told}.")
            self.wait(waits)
        raise AssertionError("the last try raises")


class LocalTextModel:
    """A language model in a local Hugging Face folder.

    Args:
        folder: of the model and its tokenizer.

    Raises:
        ValueError: no such folder, or no language model in it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"folder={str(path)!r} holds no config.json: pass a folder with a language model."
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"folder={str(path)!r} cannot be loaded as a language model: {error}") from error
        self.name = f"text model {path.name}"

    def complete(self, prompt: str, tokens: int, seed: int) -> str:
        """A sampled answer; the same seed gives the same one."""
        import torch

        ids = self.tokenizer(prompt, return_tensors="pt")
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            out = self.model.generate(
                **ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
