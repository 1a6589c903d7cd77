"""The front of vLLM's servers against servers that are stand-ins: what it asks them, and what clients get."""

import asyncio
import json

import httpx
import pytest
from dualedit import save_edits
from dualedit.editing import remove_edit
from dualedit.serving.settings import Refused
from dualedit.serving.vllm.answers import AGAIN, CODE, GONE, HIT, UNREADABLE, Code
from dualedit.serving.vllm.front import Front
from dualedit.serving.vllm.plan import ASK, EDIT
from dualedit.serving.vllm.replicas import Replicas
from dualedit.store import Store, publish
from tiny_models import LLAVA, editor_of, row_of, store

TOKENS = Code.of(110, [2], [0, 1])
LETTERS = {token: chr(97 + place) for place, token in enumerate(TOKENS.digits)} | {110: "", 2: ""}


class Server:
    """A stand-in for a server of vLLM: answers by the words of a question, and speaks as a worker would.

    Attributes:
        hits: words to the number of the edit that answers them; keys: words to what a router gives.
        says: kinds that it speaks before it answers, one a request.
        seen: bodies of the requests; dies: breaks the connection behind so many chunks, once.
    """

    def __init__(self, hits=(), keys=()):
        self.hits, self.keys, self.says, self.seen = dict(hits), dict(keys), [], []
        self.dies = self.refuses = None
        self.up = True

    def respond(self, request):
        body = json.loads(request.content)
        self.seen.append((request.url.path, body))
        if not self.up:
            raise httpx.ConnectError("nobody listens")
        if self.refuses:
            return httpx.Response(self.refuses, json={"error": {"message": "too long"}})
        words = body["messages"][-1]["content"]
        if request.url.path == "/pooling":
            fresh = "again" in words and "cache_salt" not in body
            key = [0.0] * len(next(iter(self.keys.values()))) if fresh else self.keys[words]
            return httpx.Response(200, json={"data": [{"data": key}]})
        tokens, text = self._answer(words, body.get("vllm_xargs") or {})
        bound = body.get("max_tokens")
        finish = "stop" if bound is None or len(tokens) < bound else "length"
        tokens, text = tokens[:bound], text[:bound]
        for stop in body.get("stop") or ():
            if any(stop in piece for piece in text):
                place = next(i for i, piece in enumerate(text) if stop in piece)
                tokens, text, finish = tokens[: place + 1], text[:place], "stop"
        if body.get("stream"):
            return httpx.Response(200, stream=_Chunks(self, tokens, text, finish, body))
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(text)},
                  "finish_reason": finish}  # fmt: skip
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        ids = {"prompt_token_ids": [1, 2]} if body.get("return_token_ids") else {}
        return httpx.Response(200, json={"id": "x", "choices": [choice], **ids})

    def _answer(self, words, extra):
        code = Code.parse(extra.get(CODE)) if CODE in extra else None
        kind = self.says.pop(0) if self.says else None
        if code and kind is not None:
            message = code.message(kind)
        elif code and ASK in extra and words in self.hits:
            message = code.message(HIT, self.hits[words])
        else:
            named = extra.get(EDIT, "").partition("@")[0]
            answer = [f"{piece} " for piece in (f"{words} by {named or 'nobody'} it is").split()]
            return list(range(50, 50 + len(answer))), answer
        return message, [LETTERS[token] for token in message]


class _Chunks(httpx.AsyncByteStream):
    def __init__(self, server, tokens, text, finish, body):
        self.server, self.parts, self.finish = server, list(zip(tokens, text, strict=False)), finish
        self.ids, self.closed = body.get("return_token_ids"), False

    def _event(self, choice):
        return b"data: " + json.dumps({"id": "y", "choices": [choice]}).encode() + b"\n\n"

    async def __aiter__(self):
        yield self._event({"index": 0, "delta": {"role": "assistant", "content": ""}})
        for place, (token, text) in enumerate(self.parts):
            if self.server.dies == place:
                self.server.dies, self.server.up = None, False
                raise httpx.ReadError("killed")
            last = place + 1 == len(self.parts)
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": self.finish if last else None}
            yield self._event(choice | ({"token_ids": [token]} if self.ids else {}))
        yield b"data: [DONE]\n\n"

    async def aclose(self):
        self.closed = True


def front_of(place, servers, form="optimistic", router=None, patience=2.0):
    def by_host(request):
        return servers[int(request.url.host.removeprefix("s"))].respond(request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(by_host))
    replicas = Replicas([f"http://s{i}" for i in range(len(servers))], patience, client)
    routers = None
    if router is not None:
        own = httpx.AsyncClient(transport=httpx.MockTransport(router.respond))
        routers = Replicas(["http://router"], patience, own)
    return Front(Store(place), replicas, TOKENS, form, routers)


def ask(front, words, **more):
    """(text, header of the edit, version) of an answer, however it came."""

    async def run():
        found = await front.answer({"messages": [{"role": "user", "content": words}], **more})
        if found.whole is not None:
            assert "token_ids" not in json.dumps(found.whole)
            return found.whole["choices"][0]["message"]["content"], found
        text = ""
        async for chunk in found.chunks:
            assert "token_ids" not in json.dumps(chunk)
            text += chunk["choices"][0]["delta"].get("content") or ""
        return text, found

    text, found = asyncio.run(run())
    headers = found.chosen.headers()
    return text.strip(), headers["X-DualEdit-Edit"], int(headers["X-DualEdit-Version"])


def refused(front, words, **more):
    with pytest.raises(Refused) as error:
        ask(front, words, **more)
    return error.value.status, error.value.code


@pytest.fixture
def published(generator, tmp_path):
    """A model with three edits, its questions, its folder and the store."""
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.questions(6, generator)
    for row in range(3):
        store(model, row_of(inputs, row), generator)
    save_edits(model, tmp_path / "edits")
    publish(tmp_path / "edits", tmp_path / "store")
    return model, inputs, tmp_path


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request):
    return request.param


def test_a_hit_is_asked_again_with_its_edit_and_salt(published, stream):
    server = Server({"the fact": 2})
    front = front_of(published[2] / "store", [server])
    assert ask(front, "the fact", stream=stream) == ("the fact by 2-v1 it is", "2", 1)
    assert ask(front, "another", stream=stream) == ("another by nobody it is", "none", 1)
    first, again, other = (body for _, body in server.seen)
    assert first["vllm_xargs"][ASK] == 1 and "cache_salt" not in first and EDIT not in first["vllm_xargs"]
    assert again["vllm_xargs"][EDIT] == "2-v1@1" and len(again["cache_salt"]) == 64
    assert other["vllm_xargs"][ASK] == 1 and "cache_salt" not in other
    assert front.counts == {"asked": 2, "edited": 1, "again": 0}


@pytest.mark.parametrize("bound", [{"max_tokens": 1}, {"max_tokens": 3}, {"stop": ["c"]}, {"stop": ["by"]}])
def test_a_message_that_the_requests_own_bounds_cut(published, stream, bound):
    server = Server({"the fact": 2})
    front = front_of(published[2] / "store", [server])
    text, edit, _ = ask(front, "the fact", stream=stream, **bound)
    assert edit == "2" and "the fact by 2-v1 it is".startswith(text)
    last = server.seen[-1][1]
    assert all(last[name] == value for name, value in bound.items())  # the answer keeps to them


def test_a_router_gives_the_key_first(published, stream):
    model, _, place = published
    moment = Store(place / "store").now()
    keys = {f"fact {i}": key.tolist() for i, key in zip(moment.ids.tolist(), moment.keys, strict=True)}
    keys |= {f"again {i}": key for i, key in enumerate(list(keys.values()))}
    keys["far"] = (-moment.keys[0]).tolist()
    server, router = Server(), Server(keys=keys)
    front = front_of(place / "store", [server], "router", router)
    for i in moment.ids.tolist():
        assert ask(front, f"fact {i}", stream=stream)[1] == str(i)
    assert ask(front, "far", stream=stream) == ("far by nobody it is", "none", 1)
    # States that came from the prefix cache are no part of a key: asked once more, with a salt of its own.
    assert ask(front, "again 0", stream=stream)[1] == "1"
    salts = [body.get("cache_salt") for path, body in router.seen if path == "/pooling"][-2:]
    assert salts[0] is None and len(salts[1]) == 64


def test_what_a_worker_cannot_do_is_told(published, stream):
    server = Server({"the fact": 2})
    front = front_of(published[2] / "store", [server])
    server.says = [AGAIN]
    assert ask(front, "other", stream=stream)[1] == "none"
    assert "cache_salt" not in server.seen[0][1] and len(server.seen[1][1]["cache_salt"]) == 64
    server.says = [GONE]
    assert ask(front, "other", stream=stream)[1] == "none"
    server.says = [UNREADABLE]
    assert refused(front, "other", stream=stream) == (503, "no_key")
    server.says = [GONE] * 9
    assert refused(front, "other", stream=stream) == (503, "no_key")
    server.says = []
    server.hits["gone"] = 99
    assert refused(front, "gone", stream=stream) == (404, "edit_not_found")


def test_clients_do_not_reach_the_edits_by_the_back_door(published):
    front = front_of(published[2] / "store", [Server({"the fact": 2})])
    for name, value in (("vllm_xargs", {EDIT: "1-v1"}), ("kv_transfer_params", {}), ("request_id", "x")):
        assert refused(front, "the fact", **{name: value or {"a": 1}})[0] == 400
    assert refused(front, "the fact", cache_salt=3)[0] == 400
    for steered in ({"response_format": {"type": "json_object"}}, {"n": 2}, {"min_tokens": 3}):
        assert refused(front, "the fact", **steered) == (400, "unsupported_parameter")
    server = Server()
    front = front_of(published[2] / "store", [server])
    assert ask(front, "x", cache_salt="mine")[1] == "none"
    assert len(server.seen[0][1]["cache_salt"]) == 64  # the client's own goes into it


def test_an_edit_can_be_named(published, stream):
    server = Server({"the fact": 2})
    place = published[2]
    front = front_of(place / "store", [server])
    assert ask(front, "the fact", stream=stream, dualedit={"edit": 3})[:2] == ("the fact by 3-v1 it is", "3")
    assert ask(front, "the fact", stream=stream, dualedit={"edit": "none"})[1] == "none"
    assert refused(front, "the fact", dualedit={"edit": 77}) == (404, "edit_not_found")
    assert refused(front, "the fact", dualedit={"edit": "../x"})[0] == 400
    file = place / "store" / "edits" / "1-v1.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + b"?", b""):
        file.write_bytes(damaged)
        other = front_of(place / "store", [server])
        assert refused(other, "x", dualedit={"edit": 1}) == (422, "edit_damaged")
    file.unlink()
    other = front_of(place / "store", [server])
    assert refused(other, "x", dualedit={"edit": 1}) == (422, "edit_damaged")
    assert ask(front, "the fact", stream=stream)[1] == "2"  # the rest goes on


def test_every_answer_is_of_one_version(published, stream):
    model, _, place = published
    server = Server({"the fact": 2})
    front = front_of(place / "store", [server])
    wait = server.respond

    def meanwhile(request):
        """The edit is removed while its question is under way."""
        answer = wait(request)
        if len(server.seen) == 1:
            remove_edit(model, 2)
            save_edits(model, place / "edits")
            publish(place / "edits", place / "store")
            assert front.store.refresh()
        return answer

    server.respond = meanwhile
    assert ask(front, "the fact", stream=stream) == ("the fact by 2-v1 it is", "2", 1)
    assert server.seen[1][1]["vllm_xargs"][EDIT] == "2-v1@1"
    server.hits.clear()
    assert ask(front, "the fact", stream=stream) == ("the fact by nobody it is", "none", 2)


def test_a_server_that_is_gone_is_left_alone(published, stream):
    servers = [Server({"the fact": 2}), Server({"the fact": 2})]
    front = front_of(published[2] / "store", servers)
    servers[0].up = False
    for _ in range(4):
        assert ask(front, "the fact", stream=stream)[1] == "2"
    servers[1].up = False
    front.replicas.patience = 0.3
    assert refused(front, "the fact", stream=stream) == (503, "no_server")
    servers[0].up = True
    assert ask(front, "the fact", stream=stream)[1] == "2"
    servers[0].refuses = 400
    assert refused(front, "the fact", stream=stream)[0] == 400  # the request's fault, whoever is asked


@pytest.mark.parametrize("at", range(7))
def test_a_server_killed_within_an_answer(published, at):
    servers = [Server({"the fact": 2}), Server({"the fact": 2})]
    front = front_of(published[2] / "store", servers)
    for server in servers:
        server.dies = at
    servers[1].dies = None
    for words, edit in (("the fact", "2"), ("another one", "none")):
        for server in servers:
            server.up = True
        servers[0].dies = at
        text, found, _ = ask(front, words, stream=True, temperature=0)
        assert text.split() == f"{words} by {'2-v1' if edit == '2' else 'nobody'} it is".split()
        assert found == edit


def test_an_answer_of_chance_is_not_continued(published):
    servers = [Server(), Server()]
    front = front_of(published[2] / "store", servers)
    for server in servers:
        server.dies = 3

    assert refused(front, "a b c d", stream=True, temperature=1.0) == (502, "answer_lost")


def test_codes():
    assert Code.parse(str(TOKENS)) == TOKENS
    for kind in (HIT, AGAIN, UNREADABLE, GONE):
        for number in (0, 1, 15, 16, 255, 10**9):
            message = TOKENS.message(kind, number)
            assert TOKENS.read(message, False) == TOKENS.read(message[:-1], True) == (kind, number)
            assert TOKENS.read(message[:-1], False) is None  # cut, not ended
    assert TOKENS.read([110, 55, 2], True) is None and TOKENS.read([110, 2], True) is None
    for wrong in ("", "1,2", "a", None, 5, ",".join(["3"] * 18)):
        assert Code.parse(wrong) is None
    assert len({TOKENS.mark, TOKENS.end, *TOKENS.digits}) == 18
