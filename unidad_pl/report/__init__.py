"""One HTML page about a run, or several side by side: ``unidad report RUN [RUN ...]``."""

from unidad_pl.report.page import report, write_page

__all__ = ["report", "write_page"]
