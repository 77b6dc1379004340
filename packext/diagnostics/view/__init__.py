"""Records to look at: a live page, and a report. Neither knows an instrument but by its panel."""

from packext.diagnostics.view.report import write_report as write_report
from packext.diagnostics.view.server import Server as Server
