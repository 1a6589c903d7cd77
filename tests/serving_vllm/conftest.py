"""Worlds and engines, made once for all tests; nothing is collected without vLLM (`make test-serving`)."""

import gc
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parent))

WORLDS = ("toy-dualedit", "toy-balancedit", "llava-dualedit", "llava-balancedit", "qwen-dualedit",
          "qwen-balancedit")  # fmt: skip


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """World by name, made when it is first asked for."""
    from worlds import tiny_world, toy_world

    made = {}

    def world(name):
        if name not in made:
            family, method = name.split("-")
            place = tmp_path_factory.mktemp(name)
            made[name] = toy_world(method, place) if family == "toy" else tiny_world(family, method, place)
        return made[name]

    return world


@pytest.fixture(scope="session", params=WORLDS)
def world(request, worlds):
    return worlds(request.param)


@pytest.fixture(scope="module")
def engines():
    """An engine by world and settings; the last two are kept, for memory's sake."""
    from engines import engine

    kept = {}

    def made(world, edits=True, router=None, **settings):
        name = (world.name, edits, router, repr(sorted(settings.items())))
        if name not in kept:
            while len(kept) > 1:
                kept.pop(next(iter(kept)))
                gc.collect()
            kept[name] = engine(world, edits, router, **settings)
        return kept[name]

    yield made
    kept.clear()
    gc.collect()
