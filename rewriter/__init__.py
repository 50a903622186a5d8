"""rewriter: makes fine-tuning of any Transformer faster and smaller in memory with one call.

model = rewriter.optimize(model)
"""

# isort: off
from rewriter import _source_tree  # noqa: F401  first: it lets rewriter.kernels and rewriter.patterns be found

# isort: on
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
