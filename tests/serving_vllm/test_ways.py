"""The ways of an engine that take long to start: preemption, torch.compile, tensor parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import ask_all, engine, logs, tokens
from test_engine import agrees

SCRIPT = """
import json, sys, torch
sys.path[:0] = [{here!r}, {support!r}]
torch.set_num_threads(1)
import pickle
from engines import ask_all, engine, logs, tokens
if __name__ == "__main__":
    given = pickle.load(open(sys.argv[1], "rb"))
    settings = dict(tensor_parallel_size=2, distributed_executor_backend="mp", enable_prefix_caching=True)
    llm = engine(given["world"], given["edits"], **settings)
    outputs = ask_all(llm, given["world"].asks, given["names"])
    torch.save([(tokens(o), logs(o)) for o in outputs], sys.argv[2])
"""


def test_preemption(worlds, engines):
    world = worlds("toy-balancedit")  # whose values apply to every token of an answer
    names = [world.named(ask) for ask in world.asks]
    more = dict(tokens=60, ignore_eos=True, logprobs=1)
    calm = ask_all(engines(world, enable_prefix_caching=False), world.asks, names, **more)
    llm = engines(
        world, enable_prefix_caching=True, num_gpu_blocks_override=12, max_num_seqs=8, disable_log_stats=False
    )
    pressed = ask_all(llm, world.asks, names, **more)
    count = sum(m.value for m in llm.get_metrics() if "preemptions" in m.name and hasattr(m, "value"))
    assert count > 3
    assert [tokens(output) for output in pressed] == [tokens(output) for output in calm]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-dualedit", "toy-balancedit"])
def test_compiled(name, worlds):
    world = worlds(name)
    names = [world.named(ask) for ask in world.asks]
    found = {}
    for edits in (False, True):
        llm = engine(world, edits, enforce_eager=False, enable_prefix_caching=False)
        found[edits] = ask_all(llm, world.asks, names if edits else [None] * len(names))
        del llm
    assert agrees(found[True], world.asks)
    for ask, one, other in zip(world.asks, found[True], found[False], strict=True):
        assert ask.edit is not None or torch.equal(logs(one), logs(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-dualedit", "toy-balancedit", "llava-balancedit"])
def test_on_two_processes(name, worlds, tmp_path):
    import pickle

    world = worlds(name)
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(here=str(here), support=str(here.parent / "support")))
    editor, world.editor = world.editor, None
    found = {}
    try:
        names = [world.named(ask) for ask in world.asks]
        for edits in (False, True):
            given = {"world": world, "edits": edits, "names": names if edits else [None] * len(names)}
            (tmp_path / "given").write_bytes(pickle.dumps(given))
            command = [sys.executable, str(script), str(tmp_path / "given"), str(tmp_path / "found")]
            subprocess.run(command, check=True, timeout=900, env=dict(os.environ))
            found[edits] = torch.load(tmp_path / "found")
    finally:
        world.editor = editor
    for ask, (made, far), (_, stock) in zip(world.asks, found[True], found[False], strict=True):
        assert made == ask.edited and float((far - ask.logs).abs().max()) < 1e-4
        assert ask.edit is not None or torch.equal(far, stock)
