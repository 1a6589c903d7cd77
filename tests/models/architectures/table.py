"""Writes docs/architectures.md from a run of the tests: `python -m tests.models.architectures.table`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import transformers

from .builders import ARCHITECTURES, REFUSED
from .case import MODES
from .parts import REGISTERED

PAGE = Path(__file__).resolve().parents[3] / "docs" / "architectures.md"
COLUMNS = (
    "decoder layers", "image positions", "edit text", "edit image", "BalancEdit", *MODES, "save and load",
)  # fmt: skip
_HEAD = """# Architectures

Written by `python -m tests.models.architectures.table` from a run of the tests with transformers {version}: do not
edit.

Every row is a tiny model with random weights. The tests find its layers by every kind of name, check by
changing the picture which positions depend on it, store an edit (DualEdit at layers 1 and 2, BalancEdit at a
linear layer), hit it, generate, save and load it with identical logits, and compare with the unedited model
bit for bit wherever no edit applies. {ours} architectures pass.

- *yes* in a generation mode: bit for bit the base model's tokens and logits where no edit applies, and the
  edited answer, as greedy decoding gives it wherever the base model's answer is its own greedy one.
- *own*: the base model's own answer in this mode is not its greedy one, so the edited one is not compared; where
  no edit applies, it stays bit for bit.
- *base* and a number: the base model itself fails in this mode; its error is below the table.
- *edit image: no*: pictures come in through cross-attention, so that no position of the sequence is one.
"""  # noqa: E501


class Collector:
    """A pytest plugin that keeps what the tests note for the table, and what failed."""

    def __init__(self):
        self.cells: dict[tuple[str, str], str] = {}
        self.refused: dict[str, str] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        for key, value in report.user_properties:
            kind, _, rest = key.partition(":")
            if kind == "support":
                name, _, column = rest.partition(":")
                self.cells[name, column] = value
            elif kind == "refused":
                self.refused[rest] = value


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def render(found: Collector) -> str:
    """The page in Markdown."""
    errors: list[str] = []
    lines = [_row("architecture", *COLUMNS), _row(*["---"] * (len(COLUMNS) + 1))]
    for name in ARCHITECTURES:
        cells = []
        for column in COLUMNS:
            value = found.cells[name, column]
            if value.startswith("base fails"):
                errors.append(f"{name}, {column}: {value.partition(': ')[2]}")
                value = f"base {len(errors)}"
            cells.append(value)
        lines.append(_row(name, *cells))
    page = [_HEAD.format(version=transformers.__version__, ours=len(ARCHITECTURES)), *lines, ""]
    page += ["What base models cannot do by themselves:", ""]
    page += [f"{number}. {error}" for number, error in enumerate(errors, 1)] or ["nothing."]
    page += ["", "## Refused", "", "What both editors, or DualEdit alone, say to the default config:", ""]
    page += [_row("architecture", "answer"), _row("---", "---")]
    page += [_row(name, found.refused[name]) for name in REFUSED]
    seen = {name.partition("+")[0] for name in (*ARCHITECTURES, *REFUSED)}
    rest = [name for name in REGISTERED if name not in seen]
    page += ["", "## Registered and not tried tiny", ""]
    page += [", ".join(rest) + "." if rest else "None."]
    page += ["", "Their layers are found where their default config builds; no more is known."]
    return "\n".join(page) + "\n"


def names_in(page: str) -> list[str]:
    """The architectures that a page lists in its first table."""
    table = page.partition("| --- |")[2].partition("\n\n")[0]
    return re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)


def main() -> int:
    """Run the tests and write the page. Nothing is written if one fails."""
    found = Collector()
    folder = Path(__file__).parent
    files = [str(folder / name) for name in ("test_architectures.py", "test_refused.py")]
    code = pytest.main([*files, "-q", "-m", "", "-k", "not every_registered", *sys.argv[1:]], [found])
    if code or found.failed:
        print(f"{len(found.failed)} tests failed, so {PAGE.name} stays as it was.", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(found), encoding="utf-8")
    print(f"{PAGE}: {len(ARCHITECTURES)} architectures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
