"""`dualedit serve --engine vllm` as a whole: 16 clients, edits that come and go, a server that is killed."""

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

VLLM = (
    "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 16 --block-size 32 "
    "--kv-cache-memory-bytes 67108864 --limit-mm-per-prompt '{\"image\": 1}'"
)
QUIET = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Service:
    """A `dualedit serve --engine vllm` that runs."""

    def __init__(self, place, *options):
        self.token = "secret"
        command = [
            sys.executable, "-m", "dualedit.cli", "serve", "--engine", "vllm", "--model", "toy", "--port",
            "0", "--edits", str(place / "edits"), "--token", self.token, "--vllm", VLLM, *options,
        ]  # fmt: skip
        self.log = place / "serve.log"
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **QUIET}
            )
        end = time.monotonic() + 600
        self.url = None
        while self.url is None:
            found = re.search(r"service +(http://[\d.:]+)/v1", self.log.read_text())
            self.url = found and found[1]
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def close(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def call(self, path, body=None, method=None, token=None):
        """(status, headers, JSON or text)."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.headers, _read(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, _read(error)

    def ask(self, image, question, stream=False, **more):
        """(text, edit that answered, version of the store)."""
        body = {"messages": messages(image, question), "temperature": 0, "max_tokens": 6, "stream": stream}
        status, headers, found = self.call("/v1/chat/completions", {**body, **more})
        assert status == 200, found
        if stream:
            lines = [line[6:] for line in found.splitlines() if line.startswith("data: ")]
            assert lines.pop() == "[DONE]"
            parts = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
            text = "".join(parts)
        else:
            text = found["choices"][0]["message"]["content"]
        return text.strip(), headers["X-DualEdit-Edit"], int(headers["X-DualEdit-Version"])


def _read(answer):
    data = answer.read().decode()
    return json.loads(data) if "json" in answer.headers.get("content-type", "") else data


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(image, question):
    picture = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module", params=["optimistic", "router"])
def service(request, worlds, tmp_path_factory):
    """A service of a world's edits in each of the two forms; the optimistic one has two servers."""
    import shutil

    world = worlds("toy-dualedit")
    place = tmp_path_factory.mktemp("served")
    shutil.copytree(world.folder, place / "edits")
    more = ["--replicas", "2"] if request.param == "optimistic" else []
    running = Service(place, "--form", request.param, *more)
    running.form = request.param
    yield running
    running.close()


def said(world, ids):
    return world.editor.prompter.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.timeout(1800)
def test_sixteen_clients(service, worlds):
    world = worlds("toy-dualedit")
    jobs = [(ask, turn % 2 == 0) for turn in range(4) for ask in world.asks]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: service.ask(job[0].image, job[0].question, job[1]), jobs))
    for (ask, _), (text, edit, version) in zip(jobs, found, strict=True):
        assert (text, edit) == (said(world, ask.edited), str(ask.edit or "none").lower()) and version >= 1


@pytest.mark.timeout(1800)
def test_with_openais_client(service, worlds):
    from openai import OpenAI

    ask = worlds("toy-dualedit").fired[0]
    client = OpenAI(base_url=f"{service.url}/v1", api_key="none")
    made = client.chat.completions.create(
        model="embedded", messages=messages(ask.image, ask.question), temperature=0, max_tokens=6
    )
    assert made.choices[0].message.content.strip() == said(worlds("toy-dualedit"), ask.edited)


@pytest.mark.timeout(1800)
def test_what_is_refused_and_what_lives_on(service, worlds):
    world = worlds("toy-dualedit")
    ask = world.fired[0]
    body = {"messages": messages(ask.image, ask.question), "max_tokens": 6, "temperature": 0}
    chat = "/v1/chat/completions"
    assert service.call(chat, {**body, "dualedit": {"edit": 12345}})[0] == 404
    assert service.call(chat, {**body, "vllm_xargs": {"dualedit": "1-v1"}})[0] == 400
    assert service.call(chat, {**body, "model": "other"})[0] == 404
    assert service.call(chat, {**body, "messages": "x"})[0] == 400
    assert service.call(chat, {**body, "max_tokens": -3})[0] == 400
    assert service.call("/v1/edits", {"prompt": "q?", "target": "a"}, token="wrong")[0] == 401
    assert service.ask(ask.image, ask.question, dualedit={"edit": "none"})[0] == said(world, ask.base)
    assert service.ask(ask.image, ask.question)[1] == str(ask.edit)
    assert service.call("/health")[2]["status"] == "ok"


@pytest.mark.timeout(1800)
def test_an_edit_is_added_and_removed_while_answers_stream(service, worlds):
    world = worlds("toy-dualedit")
    asked = next(a for a in world.unedited if a.question.startswith("who founded"))
    other = next(a for a in world.asks if a.base != asked.base and a.question == asked.question)
    target = said(world, other.base)
    stop, seen, errors = threading.Event(), [], []

    def client(number):
        while not stop.is_set():
            began = time.monotonic()
            try:
                seen.append((began, *service.ask(asked.image, asked.question, number % 2 == 0)))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        new = {"image": data_url(asked.image), "prompt": asked.question, "target": target}
        status, _, made = service.call("/v1/edits", new, token=service.token)
        assert status == 201, made
        confirmed = time.monotonic()
        if service.form == "optimistic":
            # One of the two servers is killed within the answers, and comes back by itself.
            pids = subprocess.run(
                ["pgrep", "-f", "-P", str(service.process.pid), "api_server"], capture_output=True, text=True
            ).stdout.split()
            assert len(pids) == 2
            os.killpg(int(pids[0]), signal.SIGKILL)
        time.sleep(4)
        removed = service.call(f"/v1/edits/{made['id']}", method="DELETE", token=service.token)
        assert removed[0] == 200
        taken = time.monotonic()
        time.sleep(3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == [] and len(seen) > 10
    versions = sorted({version for *_, version in seen})
    first, added, without = versions[0], versions[-2], versions[-1]
    assert added == without - 1
    right = {first: (said(world, asked.base), "none"), added: (target, str(made["id"])),
             without: (said(world, asked.base), "none")}  # fmt: skip
    for began, text, edit, version in seen:
        assert (text, edit) == right[version], version  # every answer is of one version
        # Two seconds after a change was confirmed, whichever server is asked answers with it.
        assert version >= added or began < confirmed + 2
        assert version == without or began < taken + 2
