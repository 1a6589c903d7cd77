"""Reading results, and seeing inside a model.

`read_results` takes what `dualedit eval` wrote; `render_report` and `markdown_tables` say what is in it. What
`dualedit analyze` measures is in `studies`: attention, noise, writes and gates, layer by layer.
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
