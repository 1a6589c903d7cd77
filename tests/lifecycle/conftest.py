"""The tiny models of the other tests serve here, too; and a torchvision, where there is one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dualedit"))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def _import_torchvision() -> str | None:
    """None once torchvision can be imported, or else why it cannot.

    A torchvision built for another torch (PyPI's is built for CUDA) fails at the two operators that it
    describes in Python without looking whether its C++ part was loaded. Processors need neither.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed, and Qwen's processor needs it (make test-all has it)"
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            return f"torchvision cannot be imported: {error}"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", arguments)
        import torchvision  # noqa: F401
    return None


_WITHOUT_TORCHVISION = _import_torchvision()


@pytest.fixture
def torchvision():
    """Skips a test where torchvision is missing."""
    if _WITHOUT_TORCHVISION:
        pytest.skip(_WITHOUT_TORCHVISION)
