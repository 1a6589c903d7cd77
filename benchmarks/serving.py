"""Questions and edits at a served model at once: is every answer right, every edit kept, and memory steady?

    python -m benchmarks.serving --minutes 3 --json benchmarks/results/serving.json

A process of its own serves the embedded model on the loopback address. 16 clients ask without a pause while 2
others edit: each makes edits of its own facts, removes some, and goes on. What is counted:

- wrong: an answer that is not what `Editor`, asked alone, answers with the edit that the answer names (or
  with none). The expected answers are made before, one question at a time.
- missed: a question about an edited fact, asked after the edit was confirmed and answered before its removal
  was requested, that no edit answered. ghosts: an answer by an edit that was not there during the question.
- lost: an edit that was confirmed and not removed, and that the list, or the saved folder loaded in another
  process, does not hold in the end; or one that was removed, and is there.
- memory: what the server's process holds, read from /metrics, once it has answered 1,000 questions: until
  then its allocator's pools fill. Its growth is that of the last quarter of the run over the second one.
- throughput: rounds of questions without edits going on, to the edited model with its edits stored and to the
  plain one, by turns. Both answer in the same batches, behind the same HTTP. The ratios are the medians of
  those of two rounds in a row, of answers a second and of the server's CPU time an answer; the latter does
  not count what else the machine does.

Exit code 1 where an answer is wrong or an edit is lost.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASKERS, EDITORS, FACTS = 16, 2, 16
WARM = 1000  # questions before memory is looked at
ROUNDS = 8  # of throughput, each side
_UNDO = 10  # changes that the server can take back: what it keeps for that is no growth once they are there


@dataclass(frozen=True)
class Question:
    """One request body, the fact that it is about (None: of no edited one), and what may be answered.

    `answers`: by the fact whose edit answers; None: the unedited model.
    """

    body: bytes
    fact: int | None
    answers: dict[int | None, str]


@dataclass(frozen=True)
class Asked:
    """What came back: seconds by `time.monotonic`, the answer, and the number of the edit that gave it."""

    question: Question
    sent: float
    received: float
    text: str
    edit: int | None


@dataclass
class Life:
    """An edit on the server: when its making and its removal were requested and confirmed."""

    fact: int
    asked: float
    made: float
    leaving: float = float("inf")
    gone: float = float("inf")


@dataclass
class Run:
    """What the clients have seen."""

    asked: list[Asked] = field(default_factory=list)
    lives: dict[int, Life] = field(default_factory=dict)
    memory: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- the server


def serve(kind: str, folder: str) -> None:
    """Serve the embedded model, "edited" or "plain"; the port is the first line printed."""
    import socket

    import uvicorn
    from dualedit.serving import Limits, Service, Settings, create_app
    from dualedit.toy.editors import load_editor
    from dualedit.toy.model import load_embedded

    settings = Settings(limits=Limits(undo=_UNDO))
    service = Service(load_editor(fallback=False), Path(folder), settings)
    if kind == "plain":
        service.worker.model = load_embedded()[0]
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(create_app(service), log_level="error")).run(sockets=[listening])


@contextmanager
def serving(kind: str, folder: str):
    """A server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "benchmarks.serving", "--serve", kind, "--folder", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(30)


class Client:
    """A connection that is kept."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, Any]:
        """Status, body, headers."""
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def ask(self, question: Question) -> Asked:
        """One question. Raises RuntimeError for a status that is not 200."""
        sent = time.monotonic()
        status, body, headers = self.call("POST", "/v1/chat/completions", question.body)
        received = time.monotonic()
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:200]!r}")
        text = json.loads(body)["choices"][0]["message"]["content"]
        named = headers["X-DualEdit-Edit"]
        return Asked(question, sent, received, text, None if named == "none" else int(named))


# ---------------------------------------------------------------------- what is asked, and what is right


def _coded(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def prepare(facts: int = FACTS) -> tuple[list[bytes], list[Question]]:
    """Bodies of the edits, and the questions with what `Editor` answers alone."""
    from dualedit.toy.editors import load_editor
    from dualedit.toy.samples import edit_samples
    from dualedit.toy.world import World

    editor = load_editor(fallback=False)
    samples = edit_samples(World(0), "test", facts, 5)
    pairs: list[tuple[Any, str, int | None]] = []
    for fact, sample in enumerate(samples):
        pairs.append((sample.request.image, sample.request.prompt, fact))
        pairs += [
            (p.image, p.prompt, fact) for p in (*sample.generality["t_gen"], *sample.generality["v_gen"])
        ]
        for kind in ("t_loc", "hard_image", "hard_question"):
            pairs += [(p.image, p.prompt, None) for p in sample.locality[kind][:1]]
    answers: list[dict[int | None, str]] = [{None: editor.answer(i, q)} for i, q, _ in pairs]
    for fact, sample in enumerate(samples):
        editor.edit(sample.request.image, sample.request.prompt, sample.request.target)
        for place, found in enumerate(editor.explain_many([(i, q) for i, q, _ in pairs])):
            if found.distance <= 1.05 * found.radius:  # it fires, or is so near that it may
                answers[place][fact] = editor.answer(*pairs[place][:2])
        editor.undo()
    edits = [
        json.dumps(
            {"image": _coded(s.request.image), "prompt": s.request.prompt, "target": s.request.target}
        ).encode()
        for s in samples
    ]
    questions = []
    for (image, prompt, fact), right in zip(pairs, answers, strict=True):
        picture = [] if image is None else [{"type": "image_url", "image_url": {"url": _coded(image)}}]
        content = [*picture, {"type": "text", "text": prompt}]
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8}).encode()
        questions.append(Question(body, fact if fact in right else None, right))
    return edits, questions


# ---------------------------------------------------------------------- the clients


def askers(
    port: int, questions: list[Question], until: float, run: Run, count: int = ASKERS, most: int = 2**60
) -> list:
    """Threads that ask until a time, or until they have asked `most` questions together."""

    def work(number: int) -> None:
        client, chance = Client(port), random.Random(number)
        found = []
        try:
            while time.monotonic() < until and len(found) * count < most:
                found.append(client.ask(chance.choice(questions)))
        except Exception as error:
            run.errors.append(f"asker {number}: {type(error).__name__}: {error}")
        run.asked.extend(found)

    return [threading.Thread(target=work, args=(number,)) for number in range(count)]


def editors(port: int, edits: list[bytes], until: float, run: Run, count: int = EDITORS) -> list:
    """Threads that make and remove edits of their own facts until a time."""

    def work(number: int) -> None:
        client, chance = Client(port), random.Random(100 + number)
        own, held = list(range(number, len(edits), count)), {}
        try:
            while time.monotonic() < until:
                fact = chance.choice(own)
                if fact in held:
                    life = run.lives[held[fact]]
                    life.leaving = time.monotonic()
                    status, body, _ = client.call("DELETE", f"/v1/edits/{held.pop(fact)}")
                    life.gone = time.monotonic()
                else:
                    asked = time.monotonic()
                    status, body, _ = client.call("POST", "/v1/edits", edits[fact])
                    if status == 201:
                        held[fact] = json.loads(body)["id"]
                        run.lives[held[fact]] = Life(fact, asked, time.monotonic())
                if status not in (200, 201):
                    raise RuntimeError(f"status {status}: {body[:200]!r}")
                time.sleep(chance.uniform(0.05, 0.4))
        except Exception as error:
            run.errors.append(f"editor {number}: {type(error).__name__}: {error}")

    return [threading.Thread(target=work, args=(number,)) for number in range(count)]


def metric(port: int, name: str) -> float:
    """A figure of the server's /metrics."""
    text = Client(port).call("GET", "/metrics")[1].decode()
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[1])


def memory_of(port: int) -> float:
    """What the server's process holds, in MiB."""
    return metric(port, "process_resident_memory_bytes") / 2**20


def together(threads: list, port: int | None = None, run: Run | None = None) -> None:
    """Start threads and wait for them; with a port, note the server's memory each second."""
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if port is not None and run is not None:
            run.memory.append((time.monotonic() - began, memory_of(port)))
        time.sleep(1.0 if port is not None else 0.05)
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------------- judging


def judge(run: Run) -> dict[str, int]:
    """How many answers were wrong, missed and by ghosts."""
    of_fact: dict[int, list[Life]] = defaultdict(list)
    for life in run.lives.values():
        of_fact[life.fact].append(life)
    wrong = missed = ghosts = 0
    for asked in run.asked:
        life = None if asked.edit is None else run.lives.get(asked.edit)
        if asked.edit is not None and (life is None or asked.received < life.asked or asked.sent > life.gone):
            ghosts += 1
            continue
        fact = None if life is None else life.fact
        wrong += asked.question.answers.get(fact) != asked.text
        there = any(
            each.made <= asked.sent and asked.received <= each.leaving
            for each in of_fact.get(asked.question.fact, ())
        )
        missed += there and asked.edit is None
    return {"wrong": wrong, "missed": missed, "ghosts": ghosts}


def lost_edits(run: Run, port: int, folder: str) -> int:
    """Edits that the list or the folder should hold and does not, and the other way round."""
    held = {number for number, life in run.lives.items() if life.gone == float("inf")}
    listed = {edit["id"] for edit in json.loads(Client(port).call("GET", "/v1/edits")[1])["data"]}
    code = (
        "import sys, json; from dualedit import list_edits, load_edits; "
        "from dualedit.toy.model import load_embedded; model = load_edits(load_embedded()[0], sys.argv[1]); "
        "print(json.dumps([edit.id for edit in list_edits(model)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    saved = set(json.loads(done.stdout.splitlines()[-1]))
    return len(held ^ listed) + len(held ^ saved)


def throughput(port: int, questions: list[Question], seconds: float) -> tuple[float, float]:
    """Answers a second to the clients, nobody editing, and CPU seconds of the server an answer."""
    run = Run()
    busy, began = metric(port, "process_cpu_seconds_total"), time.monotonic()
    together(askers(port, questions, began + seconds, run))
    if run.errors:
        raise RuntimeError(run.errors[0])
    busy = metric(port, "process_cpu_seconds_total") - busy
    return len(run.asked) / (time.monotonic() - began), busy / len(run.asked)


def compare(port: int, questions: list[Question], rounds: int, seconds: float) -> dict[str, Any]:
    """The throughput of the edited model against the plain one's."""
    found: dict[str, list[tuple[float, float]]] = {"edited": [], "plain": []}
    with tempfile.TemporaryDirectory() as place, serving("plain", f"{place}/none") as plain:
        for number in range(2 * rounds):
            which = ("edited", "plain")[(number + number // 2) % 2]  # the order changes every turn
            found[which].append(throughput(port if which == "edited" else plain, questions, seconds))
    pairs = list(zip(found["edited"], found["plain"], strict=True))
    return {
        "answers a second, edited": round(statistics.median(e[0] for e in found["edited"]), 1),
        "answers a second, plain": round(statistics.median(p[0] for p in found["plain"]), 1),
        "throughput, edited / plain": round(statistics.median(e[0] / p[0] for e, p in pairs), 3),
        "CPU an answer, edited / plain": round(statistics.median(e[1] / p[1] for e, p in pairs), 3),
    }


def measure(
    minutes: float, rounds: int = ROUNDS, seconds: float = 5.0, warm: int = WARM
) -> dict[str, Any]:
    """The whole run: `warm` questions, then clients and editors, then `rounds` of throughput on each side."""
    edits, questions = prepare()
    with tempfile.TemporaryDirectory() as place, serving("edited", f"{place}/edits") as port:
        if warm:
            together(askers(port, questions, float("inf"), Run(), most=warm))
        run = Run()
        until = time.monotonic() + 60 * minutes
        clients = askers(port, questions, until, run) + editors(port, edits, until, run)
        together(clients, port, run)
        waited = sorted(asked.received - asked.sent for asked in run.asked)
        held = [mib for _, mib in run.memory]
        quarter = max(1, len(held) // 4)
        last = statistics.median(held[-quarter:])
        before = statistics.median(held[quarter : 2 * quarter] or held)
        figures: dict[str, Any] = {
            "minutes": minutes,
            "asked": len(run.asked),
            "answered by edits": sum(asked.edit is not None for asked in run.asked),
            "edits made": len(run.lives),
            "edits removed": sum(life.gone < float("inf") for life in run.lives.values()),
            "errors": run.errors,
            **judge(run),
            "lost": lost_edits(run, port, f"{place}/edits"),
            "answers a second while editing": round(len(run.asked) / (60 * minutes), 1),
            "seconds an answer, median": round(statistics.median(waited), 4),
            "seconds an answer, 95 %": round(waited[int(0.95 * (len(waited) - 1))], 4),
            "memory, MiB": round(last, 1),
            "memory growth, MiB": round(last - before, 1),
        }
        return figures | (compare(port, questions, rounds, seconds) if rounds else {})


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="how long clients ask while others edit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--serve", choices=("edited", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve(given.serve, given.folder)
        return 0
    figures = measure(given.minutes)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if given.json:
        from benchmarks.common import machine

        given.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "serving": figures}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return int(any(figures[name] for name in ("wrong", "missed", "ghosts", "lost", "errors")))


if __name__ == "__main__":
    sys.exit(main())
