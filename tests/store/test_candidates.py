"""Who may be nearest: sources of candidates against one lookup in the whole table."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from dualedit.store.candidates import FlatKeys, InvertedKeys, Together, decide
from dualedit.store.lookup import Lookup

from dualedit_kernels import nearest_key

METRICS = ("cosine", "l2")


def table(generator, count=600, width=24, groups=40):
    """Keys in groups whose radii overlap, some of them stored twice, and queries near and far."""
    centres = torch.randn(groups, width, generator=generator) * 2
    keys = centres[torch.randint(0, groups, (count,), generator=generator)]
    keys = keys + 0.3 * torch.randn(count, width, generator=generator)
    keys[count // 2] = keys[3]  # ties over the middle
    keys[count - 1] = keys[count // 2 - 1]
    keys[7] = float("nan")
    keys[11] = 0.0
    chosen = torch.randint(0, count, (60,), generator=generator)
    query = keys[chosen] + 0.2 * torch.randn(60, width, generator=generator)
    query[0], query[1], query[2] = keys[3], keys[count - 1], torch.randn(width, generator=generator)
    query[3] = float("nan")
    return keys, query


def radii(keys, query, metric, generator):
    everywhere = torch.full((len(keys),), torch.inf)
    far = nearest_key(query, keys, everywhere, metric)[1]
    middle = far[far.isfinite()].median()
    return middle * (0.5 + torch.rand(len(keys), generator=generator))


def agrees(found, query, keys, radius, metric):
    """Whether a decision is the very one of a lookup in the whole table."""
    route, distance = nearest_key(query, keys, radius, metric)
    row, _ = nearest_key(query, keys, torch.full_like(radius, torch.inf), metric)
    assert torch.equal(found.route, route) and torch.equal(found.row, row)
    assert torch.equal(found.distance, distance)
    assert 0 < int((route >= 0).sum()) < len(query)  # some fire, some do not
    return True


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cuts", [(), (300,), (1, 2, 300, 599)])
def test_parts_are_as_the_whole(metric, cuts, generator):
    keys, query = table(generator)
    radius = radii(keys, query, metric, generator)
    ends = [0, *cuts, len(keys)]
    parts = [FlatKeys(keys[a:b], radius[a:b], metric, a) for a, b in zip(ends, ends[1:], strict=False)]
    for order in (parts, parts[::-1]):  # whoever speaks first, the lowest row has a tie
        assert agrees(Together(*order).nearest(query), query, keys, radius, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_no_keys_and_one(metric, generator):
    keys, query = table(generator)
    empty = FlatKeys(keys[:0], torch.empty(0), metric)
    found = empty.nearest(query)
    assert (found.route == -1).all() and (found.row == -1).all() and found.distance.isinf().all()
    both = Together(empty, FlatKeys(keys[:1], torch.tensor([100.0]), metric)).nearest(query[:3])
    assert both.row.tolist() == [0, 0, 0]


def test_the_radius_is_the_nearest_ones():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.2]])
    source = FlatKeys(keys, torch.tensor([0.0, 10.0]), "l2")
    found = decide(query, source.propose(query), "l2")
    assert found.route.tolist() == [-1]  # the far one reaches it, and is not asked
    assert found.row.tolist() == [0]


SHARD = """
import sys, torch, torch.distributed as dist
from dualedit.store.candidates import FlatKeys, ShardedKeys
torch.set_num_threads(1)
rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
given = torch.load(f"{folder}/given.pt")
for metric, radius in given["radius"].items():
    keys, count = given["keys"], len(given["keys"])
    first, last = rank * count // world, (rank + 1) * count // world
    own = FlatKeys(keys[first:last], radius[first:last], metric, first)
    # Only the first process knows the questions.
    query = given["query"].clone() if rank == 0 else torch.zeros_like(given["query"])
    found = ShardedKeys(own).nearest(query)
    torch.save(vars(found), f"{folder}/{metric}-{rank}.pt")
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_shards_on_other_processes_are_as_the_whole(generator, tmp_path):
    keys, query = table(generator)
    radius = {metric: radii(keys, query, metric, generator) for metric in METRICS}
    torch.save({"keys": keys, "query": query, "radius": radius}, tmp_path / "given.pt")
    (tmp_path / "shard.py").write_text(SHARD)
    port, world = free_port(), 3
    command = [sys.executable, str(tmp_path / "shard.py")]
    started = [
        subprocess.Popen([*command, str(rank), str(world), str(port), str(tmp_path)], env=os.environ)
        for rank in range(world)
    ]
    assert [process.wait(120) for process in started] == [0] * world
    for metric in METRICS:
        for rank in range(world):
            found = type("Found", (), torch.load(tmp_path / f"{metric}-{rank}.pt"))
            assert agrees(found, query, keys, radius[metric], metric)


@pytest.mark.parametrize("metric", METRICS)
def test_inverted_lists_and_exact_distances(metric, generator):
    pytest.importorskip("faiss")
    keys, query = table(generator, count=4000)
    radius = radii(keys, query, metric, generator)
    everything = InvertedKeys(keys, radius, metric, lists=16, probed=16, candidates=64)
    good = query.isfinite().all(1)
    assert agrees(everything.nearest(query[good]), query[good], keys, radius, metric)
    # Few lists are looked into: what it finds may be another key, never another distance or radius.
    few = InvertedKeys(keys, radius, metric, lists=64, probed=1, candidates=4)
    found = few.nearest(query[good])
    assert int((found.row < 0).sum()) < 3  # a list may hold the zero key alone, which is never near
    for q, row, route, far in zip(query[good], found.row, found.route, found.distance, strict=True):
        if int(row) < 0:
            continue
        own, distance = nearest_key(q[None], keys[row][None], radius[row][None], metric)
        assert torch.equal(distance[0], far) and (int(own) == 0) == (int(route) == int(row))


def test_a_missed_key_is_seen_by_the_count(generator):
    """An approximate source that misses the nearest key opens another edit: the only way it is wrong."""
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    radius = torch.tensor([0.001, 1.0])
    query = torch.tensor([[1.0, 0.02]])
    whole = FlatKeys(keys, radius, "l2").nearest(query)
    assert whole.route.tolist() == [-1]
    missed = FlatKeys(keys[1:], radius[1:], "l2", first=1).nearest(query)
    assert missed.route.tolist() == [1] and float(missed.distance) > float(whole.distance)


class Given:
    """A moment of a store that is made of tables."""

    def __init__(self, keys, radius, ends):
        self.keys, self.radius, self.ends = keys, radius, ends
        self.ids = torch.arange(len(keys)) + 5
        self.version = 1

    def answering(self, now):
        return self.ends > now

    def file_of(self, number):
        return f"file {number}"


def test_edits_that_are_off_are_not_looked_up(monkeypatch):
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    now = time.time()
    moment = Given(keys, torch.full((3,), 5.0), torch.tensor([now + 50, 0.0, torch.inf], dtype=torch.float64))
    lookup = Lookup(moment, "l2", lambda radius: radius)
    route = lookup.routes(torch.tensor([[0.9, 0.1]]))[0]
    assert route.nearest == 5 and route.edit == "file 5"
    monkeypatch.setattr(time, "time", lambda: now + 60)  # it has expired meanwhile
    assert lookup.routes(torch.tensor([[0.9, 0.1]]))[0].nearest == 7
    nothing = Lookup(Given(keys[:0], torch.empty(0), torch.empty(0)), "l2", lambda radius: radius)
    assert nothing.routes(keys)[0].edit is None
