"""Tables of more than 2^31 elements: what is stored at their far end is found and used.

The tables are anonymous memory maps, which read as zeros: only the pages that are written take memory, so
that the tests run on small machines, too.
"""

import mmap
from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import Full, LowRank, backend, gated_edit_attention, nearest_key, routed_linear
from dualedit_kernels.testing import attention_case

LIMIT = 1 << 31


def zeros(*shape, dtype=torch.bfloat16, device="cpu"):
    """A table of zeros of more than 2^31 elements."""
    count = torch.Size(shape).numel()
    assert count > LIMIT
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        room = mmap.mmap(-1, count * dtype.itemsize)
    except OSError as error:
        pytest.skip(f"the system gives no {count * dtype.itemsize / 2**30:.0f} GiB of address space: {error}")
    return torch.frombuffer(room, dtype=dtype).view(shape)


def names(family):
    entries = backend.families()[family]
    return [entry.name for entry in entries if entry.refuses("cpu", torch.bfloat16) is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names("nearest_key") if name.startswith("cpp")])
def test_a_key_at_the_end_is_found(name, generator):
    keys = zeros(524_300, 4_100)
    last = len(keys) - 1
    assert last * keys.shape[1] > LIMIT
    for row in (3, last - 1, last):
        keys[row] = torch.randn(4_100, generator=generator)
    query = keys[[last, 3, last - 1]].float() + 0.01
    radius = torch.full((len(keys),), 10.0)
    for metric, distance in (("l2", 0.01 * 4_100**0.5), ("cosine", 0.5e-4)):
        with backend.use_backend(nearest_key=name):
            found = nearest_key(query, keys, radius, metric)
        assert found[0].tolist() == [last, 3, last - 1]
        torch.testing.assert_close(found[1], torch.full((3,), distance), rtol=0.1, atol=0)


def attend(generator, name, device):
    rows = 33_600_000
    lengths, route = [3, 5], [1, -1, 0, 1]
    sizes = dict(rows=4, tokens=7, dim=24, mid=64, num_heads=2, lengths=lengths, route=route)
    case = attention_case(generator, **sizes).to(torch.bfloat16)
    tensors = {name: getattr(case, name) for name in case.__dataclass_fields__}
    case = replace(case, **{n: t.to(device) for n, t in tensors.items() if isinstance(t, torch.Tensor)})
    far = {"start": torch.tensor([100, rows - 5], device=device)}
    for part in "kv":
        far[part] = zeros(rows, 64, device=device)
        far[part][100:103], far[part][-5:] = getattr(case, part)[:3], getattr(case, part)[3:]
    small, large = case.public(), replace(case, **far).public()
    with backend.use_backend(gated_edit_attention=name), torch.no_grad():
        found, want = gated_edit_attention(**large)[0], gated_edit_attention(**small)[0]
        inside = gated_edit_attention(**large | {"hidden": small["hidden"].clone()}, inplace=True)[0]
    assert not torch.equal(want, small["hidden"])
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(inside, want)


@pytest.mark.parametrize("name", names("gated_edit_attention"))
def test_an_edit_at_the_end_is_attended(name, generator):
    attend(generator, name, "cpu")


@on_triton
def test_an_edit_at_the_end_is_attended_in_triton(seed):
    attend(torch.Generator().manual_seed(seed), "triton", DEVICE)


def linear(generator, name, kind, device):
    size, out, rank = {"down": (4_096, 8, 64), "up": (8, 4_096, 64), "full": (2_048, 2_048, 0)}[kind]
    slots = LIMIT // (size * out if kind == "full" else 4_096 * 64) + 3
    shapes = {"full": (out, size)} if kind == "full" else {"down": (rank, size), "up": (out, rank)}
    x, base = (torch.randn(3, 2, n, generator=generator).bfloat16().to(device) for n in (size, out))
    small = {n: torch.randn(2, *s, generator=generator).bfloat16().to(device) / 64 for n, s in shapes.items()}
    large = {}
    for part, shape in shapes.items():
        few = torch.zeros(slots, *shape, dtype=torch.bfloat16, device=device) if part != kind else None
        large[part] = zeros(slots, *shape, device=device) if few is None else few
        large[part][[0, slots - 1]] = small[part]

    def run(tables, index):
        values = Full(*tables.values()) if kind == "full" else LowRank(tables["down"], tables["up"])
        index = torch.tensor(index, device=device)
        with backend.use_backend(routed_linear=name), torch.no_grad():
            return routed_linear(x, None, None, values, index, base=base)

    want = run(small, [1, -1, 0])
    assert not torch.equal(want[0], base[0]) and not torch.equal(want[2], base[2])
    torch.testing.assert_close(run(large, [slots - 1, -1, 0]), want)


@pytest.mark.parametrize("kind", ["down", "up", "full"])
@pytest.mark.parametrize("name", names("routed_linear"))
def test_a_value_at_the_end_is_used(name, kind, generator):
    linear(generator, name, kind, "cpu")


@pytest.mark.parametrize("kind", ["down", "up", "full"])
@on_triton
def test_a_value_at_the_end_is_used_in_triton(seed, kind):
    linear(torch.Generator().manual_seed(seed), "triton", kind, DEVICE)


@on_triton
def test_strides_of_keys_in_triton(seed):
    step = (1 << 30) + 8
    keys = zeros(2 * step + 16, device=DEVICE).as_strided((3, 16), (step, 1))
    keys.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)))
    with backend.use_backend(nearest_key="triton"):
        found = nearest_key(keys[[2, 0, 1]].float(), keys, torch.ones(3, device=DEVICE), "l2")
    assert found[0].tolist() == [2, 0, 1] and not found[1].any()


@on_triton
def test_strides_of_weights_in_triton(seed):
    """Inputs of a weight so far apart that one tile's step is past 2^31."""
    generator, step = torch.Generator().manual_seed(seed), 1 << 25
    x, base = (torch.randn(1, 2, n, generator=generator).bfloat16().to(DEVICE) for n in (130, 4))
    flat, index = zeros(130 * step, device=DEVICE), torch.tensor([0], device=DEVICE)
    weight = flat.as_strided((1, 4, 130), (0, 1, step))
    weight.copy_(torch.randn(1, 4, 130, generator=generator))
    up = torch.randn(1, 4, 4, generator=generator).bfloat16().to(DEVICE)
    for make in (Full, lambda weight: LowRank(weight, up)):
        with backend.use_backend(routed_linear="triton"), torch.no_grad():
            found, want = (
                routed_linear(x, None, None, make(t), index, base=base) for t in (weight, weight.contiguous())
            )
        torch.testing.assert_close(found, want)
