"""The committed support table is the one of these builders."""

from .builders import ARCHITECTURES, FIRST, REFUSED
from .table import COLUMNS, PAGE, Collector, names_in, render


def test_the_committed_table_lists_the_builders():
    page = PAGE.read_text(encoding="utf-8")
    assert names_in(page) == list(ARCHITECTURES)
    for name in REFUSED:
        assert f"\n| {name} |" in page


def test_enough_architectures():
    assert len(FIRST) >= 14 and len(ARCHITECTURES) >= 45


def test_a_page_says_what_was_noted():
    found = Collector()
    found.cells = {(name, column): "yes" for name in ARCHITECTURES for column in COLUMNS}
    found.cells["llava", "beams"] = "base fails: ValueError: no beams today"
    found.refused = {name: "no" for name in REFUSED}
    page = render(found)
    assert names_in(page) == list(ARCHITECTURES)
    assert "| base 1 |" in page and "1. llava, beams: ValueError: no beams today" in page
