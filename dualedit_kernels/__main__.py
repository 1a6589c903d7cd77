"""``python -m dualedit_kernels``: which implementation runs for each operator and device, and why."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch

from . import __version__, backend, library

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """The whole report as text."""
    lines = [
        f"dualedit_kernels {__version__}",
        *(f"  {name}: {value}" for name, value in versions().items()),
        "",
    ]
    for device in devices():
        lines.append(device)
        for family in backend.families():
            lines.append(f"  {family}")
            for text, names in choices(family, device).items():
                lines.append(f"    {', '.join(names)}: {text}")
    lines += [
        "",
        f"Force one with {backend.ENVIRONMENT}=<name> or {backend.ENVIRONMENT}=<operator>=<name>,...",
    ]
    return "\n".join(lines)


def choices(family: str, device: str) -> dict[str, list[str]]:
    """What runs for the dtypes of a device: {"name (reason)": [dtypes]}."""
    result: dict[str, list[str]] = {}
    for dtype in DTYPES:
        try:
            choice = backend.explain(family, device, dtype)
            text = f"{choice.implementation.name} ({choice.reason})"
        except RuntimeError as error:
            text = f"ERROR: {error}"
        result.setdefault(text, []).append(str(dtype).removeprefix("torch."))
    return result


def devices() -> list[str]:
    """The device types that are reported: the CPU, and the accelerator if there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def versions() -> dict[str, str]:
    """Versions of everything that decides which implementation runs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch"
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({torch.get_num_threads()} threads)",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "triton": _triton(),
        "C++ compiler": _compiler(),
        "compiled library": library.COMPILED_REASON,
        "GPU": gpu,
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            text = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
            return text.splitlines()[0] if text else name
    return "none on the PATH"


if __name__ == "__main__":
    print(report())
