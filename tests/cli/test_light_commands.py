"""Commands that need no model start without torch: what is imported is looked at, not how long it takes."""

import subprocess
import sys

import pytest
from dualedit.toy.editors import EDITORS

HEAVY = ("torch", "transformers", "peft", "numpy", "PIL", "sklearn", "accelerate", "safetensors")
SAY = f"; print(code, *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"


def imports_of(code, *arguments):
    """What Python code leaves in `code`, the heavy modules that it imports, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; " + code + SAY, *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1], done.stdout


def command(*arguments):
    """The same of a command line."""
    return imports_of("from dualedit.cli import main; code = main(sys.argv[1:])", *arguments)


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_takes_no_model(option):
    told, printed = command(option)
    assert told == "0"
    assert "dualedit" in printed


@pytest.mark.parametrize("name", ["edit", "eval", "demo", "list", "remove", "calibrate"])
def test_help_of_a_command_takes_no_model(name):
    told, printed = command(name, "--help")
    assert told == "0" and f"dualedit {name}" in printed


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_list_takes_no_model(method):
    told, printed = command("list", "-e", EDITORS / method)
    assert told == "0" and printed.startswith("0 ")


def test_remove_takes_no_model(tmp_path):
    (tmp_path / "edits").mkdir()
    for file in (EDITORS / "dualedit").iterdir():
        (tmp_path / "edits" / file.name).write_bytes(file.read_bytes())
    told, _ = command("remove", "3", "-e", tmp_path / "edits")
    assert told == "2"  # there is no edit 3, and it takes nothing to know that


def test_importing_the_package_takes_no_model():
    assert imports_of("import dualedit; code = 0") == ("0", "")
    assert imports_of("from dualedit import EditSample; code = 0") == ("0 PIL", "")


@pytest.mark.parametrize(
    "code",
    [
        # Asking where PEFT lies is not importing it.
        "import importlib.util, dualedit; importlib.util.find_spec('peft'); from peft import PeftModel",
        "import peft, dualedit",
        "import dualedit.tuners.config",
    ],
)
def test_both_methods_are_registered_with_peft(code):
    known = "sorted({'DUALEDIT', 'BALANCEDIT'} & set(peft.PEFT_TYPE_TO_CONFIG_MAPPING))"
    told, _ = imports_of(f"{code}; import peft; code = {known}")
    assert told.startswith("['BALANCEDIT', 'DUALEDIT'] torch")


def test_the_front_door_lists_its_rooms():
    import dualedit

    for name in dualedit.__all__:
        assert getattr(dualedit, name).__name__ == name
    assert set(dualedit.__all__) <= set(dir(dualedit))
    assert dualedit.storage.save_edits is dualedit.save_edits
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dualedit.nonsense  # noqa: B018
