"""PEFT's own tests, as the source distribution of the installed version holds them; nothing is copied here.

Where they come from: the folder $DUALEDIT_PEFT_TESTS (with testing_common.py in it), or else pip, which
downloads the source distribution once into the temporary folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import peft
import pytest

_FILES = ("__init__.py", "testing_common.py", "testing_utils.py")
# What the file imports and tests of edits do not use, name to what is imported of it.
_UNUSED = {"diffusers": "StableDiffusionPipeline", "datasets": "load_dataset"}


def _fetched() -> Path:
    """The folder of the tests. Skips the test where they cannot be had."""
    given = os.environ.get("DUALEDIT_PEFT_TESTS")
    if given:
        return Path(given)
    folder = Path(tempfile.gettempdir(), f"dualedit-peft-tests-{peft.__version__}")
    if (folder / "tests" / "testing_common.py").is_file():
        return folder / "tests"
    with tempfile.TemporaryDirectory() as place:
        wanted = [f"peft=={peft.__version__}", "--no-binary", "peft", "--no-deps", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", "-q", "-d", place, *wanted]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            (packed,) = Path(place).glob("peft-*.tar.gz")
            with tarfile.open(packed) as archive:
                for member in archive.getmembers():
                    parts = Path(member.name).parts
                    if member.isfile() and parts[1:-1] == ("tests",) and parts[-1] in _FILES:
                        data = archive.extractfile(member).read()
                        (folder / "tests").mkdir(parents=True, exist_ok=True)
                        (folder / "tests" / parts[-1]).write_bytes(data)
        except (subprocess.SubprocessError, ValueError, OSError) as error:
            pytest.skip(f"PEFT's tests cannot be fetched ({error}); set DUALEDIT_PEFT_TESTS to their folder")
    return folder / "tests"


def common_tests() -> types.ModuleType:
    """PEFT's `tests/testing_common.py` as a module, which asks the model hub for nothing."""
    folder = _fetched()
    stubs = [name for name in _UNUSED if importlib.util.find_spec(name) is None]
    for name in stubs:
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], _UNUSED[name], type(_UNUSED[name], (), {}))
    try:
        package = types.ModuleType("pefts_own_tests")
        package.__path__ = [str(folder)]
        sys.modules["pefts_own_tests"] = package
        module = importlib.import_module("pefts_own_tests.testing_common")
    finally:
        for name in stubs:
            del sys.modules[name]
    module.hub_online_once = lambda *_: contextlib.nullcontext()
    return module
