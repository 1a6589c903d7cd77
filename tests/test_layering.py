"""Imports only go down: each module of the library may import modules below it, never beside or above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EDITOR = ROOT / "python" / "dualedit"
KERNELS = ROOT / "dualedit_kernels"

# From the bottom up. Rooms of one level do not import each other, except as listed.
LEVELS = [
    {"files", "models", "records", "tensor_file", "version", "when_imported"},
    {"data", "folder", "runtime"},
    {"memory", "requests"},
    {"tuners"},
    {"editing", "saved", "store"},
    {"storage"},
    {"checking", "exchange", "history", "overlaps"},
    {"book"},
    {"editor"},
    {"training", "evaluation", "analysis", "baselines", "datasets"},
    {"toy", "smol"},
    {"serving"},
    {"cli"},
]
WITHIN_A_LEVEL = {("baselines", "evaluation"), ("training", "evaluation"), ("evaluation", "datasets"),
                  ("training", "datasets"), ("analysis", "evaluation"), ("baselines", "datasets"),
                  ("analysis", "datasets"), ("analysis", "training"), ("baselines", "training")}  # fmt: skip
UPPER_FLOORS = LEVELS.index({"editor"})  # from here on the package itself may be imported
KERNELS_MAY_IMPORT = {"torch", "triton", "dualedit_kernels"}


def imports(file: Path, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Full names of what a file imports, as tuples of their parts; relative imports resolved."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
    return found


def unit_of(name: tuple[str, ...]) -> str | None:
    """The part of dualedit that a full name belongs to; None for the package itself and others."""
    return name[1] if len(name) > 1 and name[0] == "dualedit" else None


def level_of(unit: str) -> int | None:
    return next((number for number, units in enumerate(LEVELS) if unit in units), None)


def files_of(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """The files of a package, each with the name of the package that it lies in."""
    return [
        (file, (folder.name, *file.relative_to(folder).parts[:-1]))
        for file in sorted(folder.rglob("*.py"))
        if "__pycache__" not in file.parts
    ]


def arrows_upward(folder: Path) -> list[str]:
    wrong = []
    for file, package in files_of(folder):
        parts = file.relative_to(folder).with_suffix("").parts
        unit = parts[0]
        if unit in ("__init__", "__main__"):
            continue  # the front door may open every room
        for name in imports(file, package):
            other = unit_of(name)
            if other is None or other == unit:
                continue
            here, there = level_of(unit), level_of(other)
            if there is None:
                if name[0] == "dualedit" and len(name) == 2 and here is not None and here >= UPPER_FLOORS:
                    continue  # `from dualedit import inject_dualedit`: the front door, from the upper floors
                wrong.append(f"{file.relative_to(folder)} imports {'.'.join(name)}")
            elif here is None or there > here or (there == here and (unit, other) not in WITHIN_A_LEVEL):
                wrong.append(f"{file.relative_to(folder)} (level {here}) imports {other} (level {there})")
    return wrong


def test_every_module_has_a_level():
    units = {file.relative_to(EDITOR).with_suffix("").parts[0] for file, _ in files_of(EDITOR)} - {
        "__init__",
        "__main__",
    }
    assert {unit for unit in units if level_of(unit) is None} == set()


def test_no_arrow_upward():
    assert arrows_upward(EDITOR) == []


def test_the_operators_know_no_models():
    wrong = []
    for file, package in files_of(KERNELS):
        import sys

        tops = {name[0] for name in imports(file, package)}
        wrong += [
            f"{file.relative_to(ROOT)}: {t}"
            for t in sorted(tops - KERNELS_MAY_IMPORT - set(sys.stdlib_module_names))
        ]
    assert wrong == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("memory/tables.py", "from ..tuners.adapter import active_adapter"),
        ("data.py", "import dualedit.tuners.layer"),
        ("runtime/context.py", "from ..memory import routing"),
        ("storage.py", "def f():\n    from .editor import Editor"),
        ("tuners/layer.py", "from dualedit import inject_dualedit"),
        ("training/loop.py", "from ..cli import main"),
        ("training/loop.py", "from dualedit.toy.world import World"),
        ("newcomer.py", "from .tuners import DualEditConfig"),
    ],
)
def test_an_arrow_upward_is_seen(file, line, tmp_path):
    folder = tmp_path / "dualedit"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(line)
    assert len(arrows_upward(folder)) == 1


def test_an_arrow_downward_is_allowed(tmp_path):
    folder = tmp_path / "dualedit"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "loop.py").write_text(
        "from ..tuners.layer import EditLayer\nfrom . import loss\nfrom dualedit import Editor"
    )
    (folder / "tuners").mkdir()
    (folder / "tuners" / "model.py").write_text(
        "import torch\nfrom ..memory import EditMemory\nfrom dualedit_kernels import Gate"
    )
    assert arrows_upward(folder) == []
