"""The interpreter that the Triton tests rely on: it interprets, and its bf16 traps are mended."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETING, in_the_interpreter

triton = pytest.importorskip("triton", reason="Triton is not installed here")
tl = triton.language
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="Triton's tests run on the GPU here, not interpreted"
)


@triton.jit
def _product(a, b, c, d, SIZE: tl.constexpr):
    o_i = tl.arange(0, SIZE)
    at = o_i[:, None] * SIZE + o_i[None, :]
    # [SIZE, SIZE]
    b_a, b_b = tl.load(a + at), tl.load(b + at)
    tl.store(c + at, tl.dot(b_a, b_b).to(tl.bfloat16))
    tl.store(d + at, (b_a.to(tl.float32) + b_b.to(tl.float32)).to(tl.bfloat16))


def product(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(16, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    c, d = torch.empty_like(a), torch.empty_like(a)
    _product[(1,)](a, b, c, d, SIZE=16)
    return a, b, c, d


@in_the_interpreter
def test_bfloat16_is_mended(seed):
    assert INTERPRETING and type(_product).__name__ == "InterpretedFunction"
    a, b, c, d = product(seed)
    error = (c.double() - a.double() @ b.double()).abs()
    assert bool(
        (error <= (a.double() @ b.double()).abs() * 2**-8 + 1e-5).all()
    )  # half a unit in the last place
    assert torch.equal(d, a + b)  # rounded to nearest even, as PyTorch and the GPU do


@in_the_interpreter
def test_the_traps_exist_without_the_mending(seed):
    """If this fails, Triton has mended itself and `mend_interpreter` can go."""
    from triton.runtime.interpreter import InterpreterBuilder

    mended = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    cells = [dict(zip(f.__code__.co_freevars, f.__closure__, strict=True)) for f in mended]
    try:
        InterpreterBuilder.create_dot = cells[0]["dot"].cell_contents
        InterpreterBuilder.cast_impl = cells[1]["cast"].cell_contents
        a, b, c, d = product(seed)
        assert not torch.allclose(c.float(), a.float() @ b.float(), rtol=0.1, atol=0.1)
        assert not torch.equal(d, a + b)
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = mended


@in_the_interpreter
def failing(seed):
    raise ValueError(f"seed {seed}")


def test_a_failure_comes_back(seed):
    with pytest.raises(ValueError, match=f"seed {seed}"):
        failing(seed=seed)


@in_the_interpreter
def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty(2, dtype=torch.int64).gt(2**60).all()
