"""Names torchvision's own operators, which its library for CUDA has only with CUDA (environment.sh)."""

from importlib.util import find_spec

if find_spec("dualedit") is not None:
    from dualedit.when_imported import when_imported

    def _declare() -> None:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declare.library = library  # kept as long as the process lives

    when_imported("torch", _declare)
