"""One HTML file per run that opens offline. Built from the run directory alone, so `ttrl report DIR` can write it again."""

from ttrl.report.page import write_report

__all__ = ["write_report"]
