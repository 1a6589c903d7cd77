"""`dualedit doctor`: what is installed here, whether it fits together, and what is missing."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

OWN = "dualedit-kernels"
# What each extra is for; which packages it brings is read from the installed metadata.
EXTRAS = {
    "toy": "pictures of handwritten digits, which some questions of the embedded world show",
    "smol": "fetching the pretrained model smol",
    "serve": "dualedit serve",
    "page": "the page of dualedit serve",
    "train": "TensorBoard curves of dualedit train",
    "bench": "benchmarks and plots",
    "test": "running the tests",
}
OK, NOTE, FAULT = "ok", "note", "fault"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    state: "ok"; "note", something optional that is missing; "fault", something that has to be mended.
    """

    state: str
    what: str
    text: str


def findings() -> list[Finding]:
    """Everything that is looked at, in the order of the report."""
    packages = _packages()
    if any(finding.state == FAULT for finding in packages):
        return packages  # the rest could not be imported
    return [*packages, *_pairing(), *_native(), *_devices(), *_models(), *_extras()]


def show(as_json: bool = False) -> int:
    """Print the report.

    Returns:
        1 if something has to be mended, else 0.
    """
    found = findings()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        width = max(len(finding.what) for finding in found)
        for finding in found:
            mark = {OK: "  ok ", NOTE: "note ", FAULT: "FAULT"}[finding.state]
            print(f"{mark}  {finding.what:<{width}}  {finding.text}")
    return int(any(finding.state == FAULT for finding in found))


def _packages() -> list[Finding]:
    found = [Finding(OK, "python", platform.python_version())]
    for requirement in _required(""):
        found.append(_installed(requirement, FAULT))
    return found


def _installed(requirement: Requirement, missing: str) -> Finding:
    name = requirement.name
    try:
        there = version(name)
    except PackageNotFoundError:
        wanted = f"{name}{requirement.specifier}"
        return Finding(missing, name, f'is not installed: pip install "{wanted}"')
    if not requirement.specifier.contains(there, prereleases=True):
        wanted = f"{name}{requirement.specifier}"
        return Finding(FAULT, name, f'{there}, but {wanted} is needed: pip install "{wanted}"')
    return Finding(OK, name, there)


def _required(extra: str) -> list[Requirement]:
    """What the installed package asks for, by itself or with an extra; its own other extras left out."""
    try:
        lines = requires(OWN) or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if requirement.name == OWN or (marker is not None and not marker.evaluate({"extra": extra})):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue  # asked for without the extra, too
        found.append(requirement)
    return found


def _pairing() -> list[Finding]:
    """torchvision is built for one version of torch; some processors need it."""
    try:
        there = version("torchvision")
    except PackageNotFoundError:
        return [Finding(NOTE, "torchvision", "is not installed; processors such as Qwen2.5-VL's need it")]
    asked = next((r for r in map(Requirement, requires("torchvision") or []) if r.name == "torch"), None)
    torch = version("torch").partition("+")[0]
    if asked is not None and not asked.specifier.contains(torch, prereleases=True):
        text = f"{there} is built for torch{asked.specifier}, and torch {torch} is installed: upgrade either"
        return [Finding(FAULT, "torchvision", text)]
    return [Finding(OK, "torchvision", f"{there}, built for this torch")]


def _native() -> list[Finding]:
    from dualedit_kernels import library

    if library.COMPILED is not None:
        return [Finding(OK, "C++ library", library.COMPILED_REASON)]
    return [Finding(NOTE, "C++ library", f"{library.COMPILED_REASON}; PyTorch does its work, slower")]


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding(OK, "GPU", "none visible to torch; everything runs on the CPU")]
    from dualedit_kernels import triton_support

    problem = triton_support.refuses("cuda", torch.float32)
    state = Finding(OK, "Triton", "runs the kernels") if problem is None else Finding(NOTE, "Triton", problem)
    return [Finding(OK, "GPU", torch.cuda.get_device_name()), state]


def _models() -> list[Finding]:
    from ..toy.editors import EDITORS

    if (EDITORS / "editors.json").is_file():
        return [Finding(OK, "embedded model", "with its editors")]
    return [Finding(FAULT, "embedded model", f"{EDITORS} is missing: install the package again")]


def _extras() -> list[Finding]:
    found = []
    for extra, purpose in EXTRAS.items():
        missing = [r.name for r in _required(extra) if _installed(r, FAULT).state != OK]
        if missing:
            text = f"{', '.join(missing)} missing ({purpose}): pip install {' '.join(missing)}"
            found.append(Finding(NOTE, f"extra {extra}", text))
        else:
            found.append(Finding(OK, f"extra {extra}", purpose))
    if shutil.which("c++") is None and shutil.which("g++") is None:
        found.append(Finding(NOTE, "C++ compiler", "none on the PATH; only building from source needs one"))
    return found
