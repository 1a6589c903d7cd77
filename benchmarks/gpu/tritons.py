"""Other versions of Triton than the installed one, each in a folder of its own.

A version is fetched once, from the package index that pip is set up for (wheels are of 200 MB, half a
gigabyte unpacked), and kept in the user's cache folder. Code runs under it in a process of its own, in which
that folder comes before the environment's packages: Triton is another, torch and all else are the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


class NotAvailable(RuntimeError):
    """A version of Triton that is neither kept here nor can be fetched."""


def oldest() -> str:
    """The oldest version that pyproject.toml allows, e.g. "3.6.0"."""
    bound = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]
    return ".".join((bound.split(".") + ["0"])[:3])


def installed() -> str:
    """The version that this process imports."""
    return metadata.version("triton")


def cache_folder() -> Path:
    """Where fetched versions are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualedit-kernels"


def fetch(version: str, cache: Path | None = None, limit: float = 600) -> Path:
    """The folder of a version, fetched if it is not there yet; NotAvailable if it cannot be.

    limit: seconds that fetching may take.
    """
    cache = cache or cache_folder()
    folder = cache / f"triton-{version}-{sys.implementation.cache_tag}"
    if (folder / "triton").is_dir():
        return folder
    print(f"fetching triton {version} (about 200 MB), to be kept in {folder}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: what an interrupted fetch leaves behind is never taken for the version.
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=cache))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        command += ["--target", str(part / "new"), f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise NotAvailable(f"triton {version} cannot be fetched: {said[-1]}")
        if not folder.exists():  # another process may have been faster
            (part / "new").rename(folder)
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"triton {version} could not be fetched in {limit:.0f} s") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Python imports the Triton of a fetched folder."""
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}
