"""The service as its clients see it: OpenAI's own client, edits over HTTP, and what is refused."""

import io
import json
import struct
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from dualedit import Editor
from dualedit.serving import Limits, Settings
from dualedit.serving.batches import Asked, _Words
from dualedit.storage import load_edits
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from PIL import Image
from served import QUESTION, chat, data_url

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
TOKEN = "a-secret"


def call(address, path, body=None, method=None, token=TOKEN, raw=None, headers=None):
    """Status, body and headers of a request."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, method=method or ("POST" if data else "GET"))
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text, status, told = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        text, status, told = error.read(), error.code, error.headers
    kind = told.get("Content-Type", "")
    return status, json.loads(text) if kind == "application/json" else text, told


def code(answer):
    status, body, _ = answer
    return status, body["error"]["code"]


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def saved_answer(folder, image):
    """What a model answers that has just loaded the saved edits."""
    base, processor = load_embedded()
    return Editor(load_edits(base, folder), processor).answer(image, QUESTION)


def test_the_story_with_openais_client(serve, pictures, tmp_path):
    """Ask, correct, ask again whole and streamed, a look-alike, explain, list, export, take back."""
    logo, again, alike = (p.image for p in pictures[:3])
    service, address = serve(tmp_path / "edits", token=TOKEN)
    client = client_of(address)

    def asked(image, **more):
        raw = client.chat.completions.with_raw_response.create(
            model="dualedit", messages=chat(image, QUESTION), **more
        )
        return raw.parse().choices[0].message.content, raw.headers["x-dualedit-edit"]

    alone = load_editor(fallback=False)
    before = {name: alone.answer(p, QUESTION) for name, p in (("logo", logo), ("alike", alike))}
    assert asked(logo) == (before["logo"], "none")
    new = {"image": data_url(logo), "prompt": QUESTION, "target": "norway", "who": "ann"}
    status, edit, _ = call(address, "/v1/edits", new)
    assert status == 201 and (edit["id"], edit["answer"], edit["who"]) == (1, "norway", "ann")
    assert asked(logo) == ("norway", "1") == asked(again)
    assert asked(alike) == (before["alike"], "none")
    stream = client.chat.completions.create(
        model="dualedit", messages=chat(logo, QUESTION), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "norway"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 2
    assert client.models.list().data[0].id == "dualedit"

    _, found, _ = call(
        address, "/v1/edits/explain", {"image": data_url(logo), "prompt": QUESTION}, token=None
    )
    assert found["fired"] and found["nearest"] == 1 and 0 <= found["distance"] <= found["radius"]
    _, listed, _ = call(address, "/v1/edits", token=None)
    assert [e["target"] for e in listed["data"]] == ["norway"]
    status, kept, told = call(address, listed["data"][0]["picture"], token=None)
    assert (status, told["Content-Type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(kept)).size == logo.size
    # what is on disk answers the same in another process
    assert saved_answer(tmp_path / "edits", logo) == "norway"
    _, lines, told = call(address, "/v1/edits/export")
    assert told["Content-Disposition"].endswith('"edits.jsonl"') and json.loads(lines)["target"] == "norway"
    _, packed, _ = call(address, "/v1/edits/export?format=zip")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(tmp_path / "exported")
    assert saved_answer(tmp_path / "exported", logo) == "norway"
    # switched off and on, removed and brought back; each is on the disk when it is confirmed
    for path, method, answers in (
        ("/1/disable", "POST", False), ("/1/enable", "POST", True), ("/1", "DELETE", False),
        ("/undo", "POST", True), ("/redo", "POST", False), ("/undo", "POST", True),
    ):  # fmt: skip
        status, changed, _ = call(address, f"/v1/edits{path}", {} if method == "POST" else None, method)
        assert (status, changed["id"]) == (200, 1)
        wanted = ("norway", "1") if answers else (before["logo"], "none")
        assert (asked(logo), saved_answer(tmp_path / "edits", logo)) == (wanted, wanted[0])
    for _ in range(2):
        assert call(address, "/v1/edits/undo", {})[0] == 200  # the two switches
    status, gone, _ = call(address, "/v1/edits/undo", {"who": "bob"})
    assert status == 200 and gone["id"] == 1
    assert asked(logo) == (before["logo"], "none")
    _, changes, _ = call(address, "/v1/edits/changes", token=None)
    told = [(c["who"], c["what"], c["edit"]) for c in changes["data"]]
    assert (told[0], told[-1]) == (("ann", "add", 1), ("bob", "undo", 1)) and len(told) == 10
    kept = [json.loads(line) for line in (tmp_path / "edits" / "changes.jsonl").read_text().splitlines()]
    assert kept == changes["data"]
    assert code(call(address, "/v1/edits/undo", {})) == (409, "nothing_to_undo")
    text = call(address, "/metrics")[1].decode()
    assert "dualedit_fired_total 6.0" in text and "dualedit_questions_total 12.0" in text
    assert "dualedit_edits 0.0" in text and "process_resident_memory_bytes" in text
    assert call(address, "/health")[1] == {
        "status": "ok", "model": "dualedit", "edits": 0, "waiting": 0, "version": "0.1.0"
    }  # fmt: skip


def test_edits_and_questions_together_answer_as_the_editor_alone(serve, pictures):
    """Rows with and without edits, of many lengths, in one batch."""
    questions = [(p.image, q) for p in pictures for q, _ in p.questions] + [(None, "4 plus 5 is what?")]
    service, address = serve(token=None)
    alone = load_editor(fallback=False)
    for picture, target in ((pictures[0], "norway"), (pictures[2], "kenya"), (pictures[3], "chile")):
        alone.edit(picture.image, QUESTION, target)
        new = {"image": data_url(picture.image), "prompt": QUESTION, "target": target}
        assert call(address, "/v1/edits", new)[0] == 201
    wanted = [(alone.answer(*q), alone.explain(*q)) for q in questions]

    def asked(question):
        status, body, told = call(address, "/v1/chat/completions", {"messages": chat(*question)})
        return body["choices"][0]["message"]["content"], told["X-DualEdit-Edit"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(asked, questions * 3))
    assert found == [(text, str(why.edit.id) if why.fired else "none") for text, why in wanted] * 3
    fired = sum(why.fired for _, why in wanted)
    assert 0 < fired < len(questions)
    rows = [line for line in call(address, "/metrics")[1].decode().splitlines() if "batch_rows" in line]
    batches = float(next(line for line in rows if line.startswith("dualedit_batch_rows_count")).split()[1])
    assert batches < 2 * len(questions)  # they were asked together, not one by one


def bomb(side):
    """A small PNG file that says it has side x side pixels."""

    def part(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", head)
        + part(b"IDAT", zlib.compress(bytes(99)))
        + part(b"IEND", b"")
    )


def message(url):
    return {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]}]}  # fmt: skip


def test_what_is_refused(serve, pictures):
    import base64

    limits = Limits(body=200_000, pixels=1_000_000, pictures=2, tokens=32)
    service, address = serve(token=TOKEN, limits=limits, hosts=("127.0.0.1",))

    def chat_code(body, **more):
        return code(call(address, "/v1/chat/completions", body, **more))

    for side in (2_000, 20_000, 60_000):  # over our limit, and over Pillow's two
        url = "data:image/png;base64," + base64.b64encode(bomb(side)).decode()
        assert chat_code(message(url)) == (413, "image_too_large")
    assert chat_code(message("data:image/png;base64,AAAA")) == (400, "invalid_image")
    assert chat_code(message("data:image/png;base64,?")) == (400, "invalid_image")
    assert chat_code(message("/etc/passwd")) == (400, "invalid_image")
    assert chat_code(message("http://127.0.0.1/a.png")) == (400, "urls_not_allowed")
    path = {
        "role": "user",
        "content": [{"type": "image", "path": "/etc/passwd"}, {"type": "text", "text": "?"}],
    }
    assert chat_code({"messages": [path]}) == (400, "invalid_message")
    small = {"type": "image_url", "image_url": {"url": data_url(pictures[0].image)}}
    many = [{"role": "user", "content": [small] * 3 + [{"type": "text", "text": QUESTION}]}]
    assert chat_code({"messages": many}) == (413, "too_many_images")
    long = b'{"messages": "' + b"x" * 200_000 + b'"}'
    assert chat_code(None, raw=long) == (413, "body_too_large")
    plain = {"messages": chat(None, "4 plus 5 is what?")}
    assert chat_code({**plain, "max_tokens": 33}) == (400, "max_tokens_too_large")
    assert chat_code({**plain, "max_tokens": 0}) == (400, "invalid_request")
    assert chat_code({**plain, "model": "gpt-4o"}) == (404, "model_not_found")
    for name, value in (
        ("n", 2),
        ("tools", [{}]),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
    ):
        assert chat_code({**plain, name: value}) == (400, "unsupported_parameter")
    assert chat_code({"messages": []}) == (400, "invalid_request")
    assert chat_code(None, raw=b"{") == (400, "invalid_request")
    assert chat_code({"messages": [{"role": "assistant", "content": "yes"}]}) == (400, "invalid_message")
    assert chat_code({"messages": chat(None, "brand " * 600)}) == (400, "context_length_exceeded")
    assert call(address, "/v1/chat/completions", plain)[0] == 200  # it goes on
    assert call(address, "/health", headers={"Host": "evil.example"})[0] == 400

    new = {"image": data_url(pictures[0].image), "prompt": QUESTION, "target": "norway"}
    for token in (None, "other"):
        status, body, told = call(address, "/v1/edits", new, token=token)
        assert (status, body["error"]["code"], told["WWW-Authenticate"]) == (401, "invalid_token", "Bearer")
        assert call(address, "/v1/edits/export", token=token)[0] == 401
        assert call(address, "/v1/edits/1", method="DELETE", token=token)[0] == 401
    assert code(call(address, "/v1/edits", {**new, "target": " "})) == (400, "invalid_value")
    assert code(call(address, "/v1/edits", {**new, "image": None})) == (400, "invalid_value")
    assert code(call(address, "/v1/edits/7", method="DELETE")) == (404, "edit_not_found")
    assert code(call(address, "/v1/edits/7")) == (404, "edit_not_found")
    failed = call(address, "/v1/edits", {**new, "target": "zq zq zq zq zq zq zq zq"})
    assert code(failed) == (422, "edit_failed") and "the model answers" in failed[1]["error"]["message"]
    assert call(address, "/v1/edits")[1]["data"] == []


def test_a_body_in_pieces_is_bounded_too(serve):
    import http.client

    _, address = serve(limits=Limits(body=10_000))
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(50):
            connection.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # it has hung up
    assert connection.getresponse().status == 413


def test_a_full_queue_and_one_who_leaves(serve, pictures):
    service, address = serve(limits=Limits(questions=2))
    release = threading.Event()
    blocked = service.worker.call(release.wait)  # the model is busy
    while service.worker.waiting:
        pass
    left, stays = (Asked((pictures[0].image, QUESTION), 8) for _ in range(2))
    service.ask(left), service.ask(stays)
    status, body, told = call(address, "/v1/chat/completions", {"messages": chat(None, "4 plus 5 is what?")})
    assert (status, body["error"]["code"], told["Retry-After"]) == (503, "queue_full", "1")
    assert call(address, "/health")[1]["waiting"] == 2
    left.cancelled = True
    release.set()
    assert blocked.result(10) and stays.done.result(10).text == "spain" and left.done.cancelled()


def test_read_only(serve, pictures):
    _, address = serve(token=None, read_only=True)
    new = {"image": data_url(pictures[0].image), "prompt": QUESTION, "target": "norway"}
    for answer in (
        call(address, "/v1/edits", new), call(address, "/v1/edits/undo", {}),
        call(address, "/v1/edits/1", method="DELETE"),
    ):  # fmt: skip
        assert code(answer) == (403, "read_only")
    assert call(address, "/v1/chat/completions", {"messages": chat(None, "4 plus 5 is what?")})[0] == 200


def test_a_disk_that_refuses_leaves_everything_as_it_was(serve, pictures, tmp_path, monkeypatch):
    service, address = serve(tmp_path / "edits", token=None)
    new = {"image": data_url(pictures[0].image), "prompt": QUESTION, "target": "norway"}
    with monkeypatch.context() as broken:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        broken.setattr("dualedit.editor.save_edits", full)
        status, body, _ = call(address, "/v1/edits", new)
        assert (status, body["error"]["code"]) == (507, "not_saved")
        assert "No space left on device. Nothing is changed." in body["error"]["message"]
    assert service.edits == [] and service.history.changes == []
    assert call(address, "/v1/edits", new)[0] == 201


def test_a_question_that_cannot_be_read_fails_alone(serve, pictures):
    service, _ = serve()
    questions = [(pictures[0].image, QUESTION), ("no picture", QUESTION), (pictures[1].image, QUESTION)]
    release = threading.Event()
    service.worker.call(release.wait)
    jobs = [Asked(question, 8) for question in questions]
    for job in jobs:
        service.ask(job)
    release.set()
    assert [job.done.exception(20) is None for job in jobs] == [True, False, True]
    assert jobs[0].done.result().text == "spain"


def test_pieces_of_an_answer_are_never_taken_back():
    class Letters:
        """A tokenizer that joins a comma to the word before it."""

        def decode(self, tokens, skip_special_tokens):
            return " ".join(tokens).replace(" ,", ",")

    tokens = ["one", ",", "two", "three", "STOP", "four"]
    for stop, wanted in (
        ((), "one, two three STOP four"),
        (("STOP",), "one, two three"),
        (("e S",), "one, two thre"),
    ):
        words, said = _Words(Letters(), stop), ""
        for number, token in enumerate(tokens):
            words.tokens.append(token)
            said += words.piece(last=number == len(tokens) - 1)
            assert wanted.startswith(said)
            if words.stopped:
                break
        assert said == wanted == words.text() and words.stopped == bool(stop)


def test_settings_have_safe_defaults():
    settings = Settings()
    assert not (settings.urls or settings.private_urls or settings.page)
