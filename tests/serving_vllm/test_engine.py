"""Edited answers are transformers', unedited ones vLLM's to the bit, however requests are batched and cut."""

import shutil

import pytest
import torch
from dualedit.editing import remove_edit
from dualedit.serving.vllm.answers import AGAIN, CODE, GONE, HIT, UNREADABLE, Code
from dualedit.serving.vllm.plan import ASK, EDIT
from dualedit.serving.vllm.salt import salt_of
from dualedit.store import Store
from engines import ask_all, logs, params, prompt, tokens

CLOSE = 1e-4  # of log probabilities, in float32
WAYS = {
    "mixed batch": dict(enable_prefix_caching=False),
    "chunked prefill": dict(enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=8),
    "prefix cache": dict(enable_prefix_caching=True),
}


def agrees(outputs, asks):
    """Whether answers are transformers', with edits."""
    for output, ask in zip(outputs, asks, strict=True):
        assert tokens(output) == ask.edited, (ask.question, ask.edit)
        assert float((logs(output) - ask.logs).abs().max()) < CLOSE, ask.question
    return True


@pytest.mark.parametrize("way", WAYS)
def test_as_transformers_and_as_stock(world, way, engines):
    names = [world.named(ask) for ask in world.asks]
    assert len(world.fired) > 1 and len(world.unedited) > 1
    changed = [ask for ask in world.fired if ask.edited != ask.base]
    assert changed, "no edit changes an answer"
    llm = engines(world, **WAYS[way])
    outputs = ask_all(llm, world.asks, names)
    assert agrees(outputs, world.asks)
    again = ask_all(llm, world.asks, names)  # with the prefix cache: from its blocks
    assert agrees(again, world.asks)
    if way == "prefix cache":
        assert all(output.num_cached_tokens for output in again)
    stock = ask_all(engines(world, edits=False, **WAYS[way]), world.asks, [None] * len(names))
    for output, plain, ask in zip(outputs, stock, world.asks, strict=True):
        if ask.edit is None:
            assert torch.equal(logs(output), logs(plain)) and tokens(output) == tokens(plain)
    # And with no edit in the batch, all of them.
    base = ask_all(llm, world.asks, [None] * len(names))
    assert all(torch.equal(logs(one), logs(other)) for one, other in zip(base, stock, strict=True))


# ---------------------------------------------------------------------- the salt


def in_turn(llm, world, salted):
    """Whether a question's answers are right as base, edited, base, another edit, edited, base."""
    ask = next(ask for ask in world.fired if ask.edited != ask.base)
    own = world.named(ask)
    other = next(world.named(a) for a in world.fired if a.edit != ask.edit)
    store = Store(world.store).now().manifest.store
    llm.reset_prefix_cache()
    seen, right = {}, True
    for name in (None, own, None, other, own, other, None):
        salt = salt_of(store, name.partition("@")[0]) if name and salted else None
        made = llm.generate([prompt(ask, name, salt)], [params(name)], use_tqdm=False)[0]
        found = logs(made)
        right = right and (name in seen or made.num_cached_tokens == 0)  # no block of anybody else's
        right = right and float((seen.setdefault(name, found) - found).abs().max()) < CLOSE
        right = right and tokens(made) == {own: ask.edited, None: ask.base}.get(name, tokens(made))
        if not right:
            return False
    return min(float((seen[own] - seen[name]).abs().max()) for name in (None, other)) > 100 * CLOSE


@pytest.mark.parametrize("name", ["toy-dualedit", "toy-balancedit"])
def test_the_salt_keeps_edits_apart(name, worlds, engines):
    llm = engines(worlds(name), enable_prefix_caching=True, block_size=32)
    assert in_turn(llm, worlds(name), salted=True)
    # What the salt is there for: without it, the same questions get each other's blocks.
    assert not in_turn(llm, worlds(name), salted=False)


def test_salts_are_of_everything_and_of_nothing_else():
    made = [
        salt_of("s", "3-v1"), salt_of("s", "3-v2"), salt_of("s", "4-v1"), salt_of("t", "3-v1"),
        salt_of("s", None, "mine"), salt_of("s", "3-v1", "mine"), salt_of("s", "3-v1", None, "new"),
        salt_of("s", "3-v1", "new"), salt_of("s", None, None, "new"),
    ]  # fmt: skip
    assert len(set(made)) == len(made) and salt_of("s", None) is None
    assert salt_of("s", "3-v1") == made[0] and all(len(salt) == 64 for salt in made)


# ---------------------------------------------------------------------- asked among the edits (optimistic)


def code_of(world):
    image = world.editor.model.peft_config["default"].image_token_ids or []
    image = image or [world.editor.model.config.image_token_id]
    ends = world.editor.prompter.tokenizer.eos_token_id
    return Code.of(image[0], [ends], [0])


def asked(llm, world, version, asks=None, **more):
    extra = {ASK: version, CODE: str(code_of(world))}
    asks = world.asks if asks is None else asks
    sampling = [params(extra_args=extra, tokens=12, **more) for _ in asks]
    return llm.generate([prompt(ask) for ask in asks], sampling, use_tqdm=False)


def said(world, output):
    """(kind, number) of what the worker says instead of an answer, or None."""
    made = tokens(output)
    return code_of(world).read(made, True) if made and made[0] == code_of(world).mark else None


@pytest.mark.parametrize("way", WAYS)
def test_only_what_an_edit_answers_is_sent_back(world, way, engines):
    version = Store(world.store).now().version
    llm = engines(world, **WAYS[way])
    means = getattr(world.editor.model.peft_config["default"], "key", "last") == "mean"
    for turn in range(2):
        outputs = asked(llm, world, version)
        for output, ask in zip(outputs, world.asks, strict=True):
            found = said(world, output)
            if means and turn and way == "prefix cache":
                assert found == (AGAIN, 0)  # cached states are no part of the mean: it takes a new salt
            elif ask.edit is None:
                assert found is None and tokens(output)[: len(ask.base)] == ask.base
            else:
                assert found == (HIT, ask.edit)
    stock = ask_all(engines(world, edits=False, **WAYS[way]), world.asks, [None] * len(world.asks))
    llm.reset_prefix_cache()
    for output, plain, ask in zip(asked(llm, world, version), stock, world.asks, strict=True):
        assert ask.edit is not None or torch.equal(logs(output), logs(plain))


# ------------------------------------------------------------------ faults are told, the engine lives


def test_faults_are_told_and_nobody_else_notices(worlds, engines, tmp_path):
    world = worlds("toy-dualedit")
    shutil.copytree(world.store, tmp_path / "store")
    llm = engines(world, dualedit={"store": str(tmp_path / "store"), "device": 0})
    fired, plain = world.fired[0], world.unedited[0]
    file = next((tmp_path / "store" / "edits").glob(f"{fired.edit}-v1*"))
    file.write_bytes(file.read_bytes()[:-100])  # half copied
    code = str(code_of(world))
    for wrong in ("77-v1@1", "1-v9@1", f"{fired.edit}-v1@1", f"{fired.edit}-v1@55", "../../etc-v1", 3, ""):
        extra = [{EDIT: wrong, CODE: code}, {EDIT: wrong}, None]
        outputs = llm.generate(
            [prompt(fired, "x"), prompt(fired, "y"), prompt(plain)],
            [params(extra_args=each) for each in extra], use_tqdm=False,
        )  # fmt: skip
        assert said(world, outputs[0]) == (UNREADABLE, 0), wrong
        assert tokens(outputs[1]) == [world.editor.prompter.tokenizer.eos_token_id]
        assert tokens(outputs[2]) == plain.base
    for version in (55, -3, "x", 1.5):
        assert said(world, asked(llm, world, version, [fired])[0]) == (GONE, 0)
    other = next(ask for ask in world.fired if ask.edit != fired.edit)
    assert agrees(ask_all(llm, [other], [world.named(other)]), [other])


def test_less_room_than_the_edits_of_a_batch_need(worlds, engines):
    world = worlds("toy-dualedit")
    size = next((world.store / "edits").iterdir()).stat().st_size
    llm = engines(world, dualedit={"device": int(1.5 * size), "host": 0})
    names = [world.named(ask) for ask in world.asks]
    assert len({name for name in names if name}) > 1
    assert agrees(ask_all(llm, world.asks, names), world.asks)
    used = llm.collective_rpc("dualedit_counts")[0]
    assert 0 < used["device"] <= 1.5 * size and used["host"] == 0


def test_values_in_eight_bits(worlds, engines):
    world = worlds("toy-dualedit")
    llm = engines(world, dualedit={"values": "int8"})
    names = [world.named(ask) for ask in world.asks]
    far = []
    for output, ask in zip(ask_all(llm, world.asks, names), world.asks, strict=True):
        assert tokens(output) == ask.edited
        far.append(float((logs(output).exp() - ask.logs.exp()).abs().max()))
    assert 1e-6 < max(far) < 0.02  # it is another value, and the answers hold


def test_edits_come_and_go_while_it_runs(worlds, engines, tmp_path):
    from dualedit.store import publish

    world = worlds("toy-dualedit")
    shutil.copytree(world.store, tmp_path / "store")
    shutil.copytree(world.folder, tmp_path / "edits")
    llm = engines(world, dualedit={"store": str(tmp_path / "store")})
    fired = world.fired[0]
    assert said(world, asked(llm, world, 1, [fired])[0]) == (HIT, fired.edit)
    from dualedit import load_edits, save_edits
    from dualedit.toy.model import load_embedded

    model = load_edits(load_embedded()[0], tmp_path / "edits")
    remove_edit(model, fired.edit)
    save_edits(model, tmp_path / "edits")
    assert publish(tmp_path / "edits", tmp_path / "store").version == 2
    # A front that has seen version 2 asks about it; one that has not still gets the answers of version 1.
    assert said(world, asked(llm, world, 2, [fired])[0]) is None
    assert said(world, asked(llm, world, 1, [fired])[0]) == (HIT, fired.edit)
    assert agrees(ask_all(llm, [fired], [f"{fired.edit}-v1@1"]), [fired])


def test_two_models_in_one_process(worlds, engines):
    one, other = worlds("toy-dualedit"), worlds("toy-balancedit")
    first, second = engines(one), engines(other)
    for llm, world in ((first, one), (second, other), (first, one)):
        names = [world.named(ask) for ask in world.asks]
        assert agrees(ask_all(llm, world.asks, names), world.asks)


# ---------------------------------------------------------------------- the router


def keys_of(llm, asks):
    from vllm import PoolingParams

    outputs = llm.embed(
        [prompt(ask) for ask in asks], pooling_params=PoolingParams(use_activation=False), use_tqdm=False
    )
    return torch.tensor([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["toy-dualedit", "toy-balancedit", "qwen-dualedit", "llava-balancedit"])
def test_a_router_gives_transformers_keys(name, way, worlds, engines):
    from dualedit.serving.vllm.values import EngineEdits

    world = worlds(name)
    store = Store(world.store)
    edits = EngineEdits(store, torch.device("cpu"), torch.float32)
    llm = engines(world, router=edits.layers[0].number + 1, **WAYS[way])
    wanted = torch.stack([ask.key for ask in world.asks])
    lookup = edits.lookup(store.now().version)
    for turn in range(2):
        keys = keys_of(llm, world.asks)
        if turn and way == "prefix cache" and edits.config.key == "mean":
            assert not keys.any()  # it says that it cannot tell
            continue
        assert float((keys - wanted).norm(dim=1).max() / wanted.norm(dim=1).mean()) < 1e-4
        routes = [None if route.edit is None else route.edit.id for route in lookup.routes(keys)]
        assert routes == [ask.edit for ask in world.asks]


def many_questions(world, count):
    """Questions about brands, digits and scenes, with transformers' routing keys."""
    from dualedit.runtime.recording import record_states
    from dualedit.toy.samples import edit_samples
    from dualedit.toy.world import World as Drawn
    from dualedit.tuners.adapter import active_adapter
    from worlds import Ask

    adapter, prompter, asks = active_adapter(world.editor.model), world.editor.prompter, []
    for sample in edit_samples(Drawn(0), "test", count // 4):
        kinds = (sample.generality["v_gen"], *sample.locality.values())
        probes = [probe for kind in kinds for probe in kind[:1]]
        for probe in probes:
            inputs = prompter.inputs([(probe.image, probe.prompt)])
            key = adapter.key_of(*record_states(adapter.base, inputs))[0].float()
            text = prompter.text(probe.image, probe.prompt)
            asks.append(Ask(probe.image, probe.prompt, text, [], None, [], None, None, key))
    return asks[:count]


@pytest.mark.parametrize("name", ["toy-dualedit", "toy-balancedit"])
def test_routes_of_200_questions_among_1000_edits(name, worlds, engines, tmp_path):
    from dualedit.serving.vllm.values import EngineEdits

    from benchmarks.vllm_overhead import with_keys

    world = worlds(name)
    shutil.copytree(world.store, tmp_path / "store")
    asks = many_questions(world, 200)
    assert len(asks) == 200
    generator = torch.Generator().manual_seed(1)
    keys = torch.stack([ask.key for ask in asks]).repeat_interleave(5, dim=0)
    noise = torch.randn(keys.shape, generator=generator) * keys.norm(dim=1, keepdim=True)
    keys = keys + noise * torch.rand(len(keys), 1, generator=generator) * 0.05
    radius = torch.rand(len(keys), generator=generator) * 0.2
    radius = radius if world.editor.model.peft_config["default"].method.name == "dualedit" else radius * 3
    with_keys(tmp_path / "store", keys, radius)
    store = Store(tmp_path / "store")
    edits = EngineEdits(store, torch.device("cpu"), torch.float32)
    version = store.now().version
    lookup = edits.lookup(version)
    wanted = [r.edit and r.edit.id for r in lookup.routes(torch.stack([ask.key for ask in asks]))]
    fired = sum(number is not None for number in wanted)
    assert len(keys) == 1000 and 40 < fired < 195
    more = dict(enable_prefix_caching=True, max_num_batched_tokens=48, max_num_seqs=8)
    settings = {"store": str(tmp_path / "store")}
    router = engines(world, router=edits.layers[0].number + 1, dualedit=dict(settings), **more)
    for _ in range(2):  # the second time from the prefix cache
        found = [r.edit and r.edit.id for r in lookup.routes(keys_of(router, asks))]
        assert found == wanted
    llm = engines(world, dualedit=dict(settings), **more)
    for output, number in zip(asked(llm, world, version, asks), wanted, strict=True):
        assert (said(world, output) or (HIT, None))[1] == number
