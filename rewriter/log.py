"""The library's logger, `rewriter`: INFO says what was rewritten, DEBUG adds near misses, op counts and graphs."""

import logging

log = logging.getLogger("rewriter")
