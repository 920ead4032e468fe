"""The report of a run: recomputed from its ledger alone, as JSON, Markdown and HTML."""

from eadt.report.document import LEDGER_FOLDER, Report, build_report, report_json_schema
from eadt.report.render import render_html, render_json, render_markdown, write_report

__all__ = [
    "LEDGER_FOLDER",
    "Report",
    "build_report",
    "render_html",
    "render_json",
    "render_markdown",
    "report_json_schema",
    "write_report",
]
