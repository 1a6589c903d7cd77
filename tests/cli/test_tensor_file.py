"""The reader and writer of safetensors files, against the safetensors library."""

import pytest
import torch
from dualedit.tensor_file import TensorFile
from safetensors.torch import load_file, save_file

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)


@pytest.fixture
def tensors(generator):
    """Tables of four rows in every dtype, one that holds nothing, and a text."""
    made = {f"a.{str(dtype)}": torch.randn(4, 3, generator=generator).to(dtype) for dtype in DTYPES}
    made["b.numbers"] = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    made["b.nothing"] = torch.empty(0, 7)
    made["c.text"] = torch.tensor(list(b"some text"), dtype=torch.uint8)
    return made


@pytest.fixture
def file(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_reading(file, tensors):
    with TensorFile(file) as opened:
        assert opened.shapes == {name: list(tensor.shape) for name, tensor in tensors.items()}
        for name in tensors:
            if name != "c.text":
                assert opened.numbers(name) == tensors[name].flatten().tolist(), name
        assert opened.data("c.text") == b"some text"


@pytest.mark.parametrize("rows", [(0, 1), (1, 3), (3, 4), (0, 4), (2, 2)])
def test_writing_without_some_rows(rows, file, tensors, tmp_path):
    cuts = {name: rows for name in tensors if name.startswith("a.")}
    with TensorFile(file) as opened:
        opened.write_without(tmp_path / "b.safetensors", cuts, {"c.text": b"another"})
    found = load_file(tmp_path / "b.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        wanted = torch.cat([tensor[: rows[0]], tensor[rows[1] :]]) if name in cuts else tensor
        wanted = torch.tensor(list(b"another"), dtype=torch.uint8) if name == "c.text" else wanted
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name
    with TensorFile(tmp_path / "b.safetensors") as opened:
        assert opened._metadata == {"format": "pt"}


def test_every_damaged_length_is_seen(file, tmp_path):
    whole = file.read_bytes()
    for length in {0, 3, 8, 20, len(whole) // 2, len(whole) - 1, len(whole) + 1}:
        file.write_bytes((whole + b"x")[:length])
        with pytest.raises(ValueError):
            TensorFile(file)
