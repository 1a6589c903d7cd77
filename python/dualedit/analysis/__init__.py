"""Reading results: the report of an evaluation as a page and as tables.

`read_results` takes what `dualedit eval` wrote; `render_report` and `markdown_tables` say what is in it.
"""

from .markdown import markdown_tables
from .reading import Records, Results, read_results
from .report_page import render_report
from .settings import Setting, settings_of

__all__ = [
    "Records",
    "Results",
    "Setting",
    "markdown_tables",
    "read_results",
    "render_report",
    "settings_of",
]
