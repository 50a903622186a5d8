"""rewriter: makes fine-tuning of any Transformer faster and smaller in memory with one call.

    model = rewriter.optimize(model)
"""

from rewriter._source_tree import search_path

__path__ += search_path()  # before anything below imports rewriter.kernels or rewriter.patterns

from rewriter.api import explain, optimize, report, restore
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.report import RewriteReport
from rewriter.session import RewriteError

__all__ = [
    "Call",
    "Match",
    "Pattern",
    "Reference",
    "RewriteError",
    "RewriteReport",
    "explain",
    "optimize",
    "report",
    "restore",
]
