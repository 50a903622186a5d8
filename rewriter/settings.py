"""Dynamo settings that regions need. They are process-wide, set when the first model is optimised."""

from __future__ import annotations

import torch._dynamo.config as config


def apply() -> None:
    """Idempotent; only ever raises limits and adds guards."""
    # Limits count per code object, which all blocks of a model may share: past the limit blocks run eagerly in silence.
    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4096)
    # Without these guards a hook registered on a submodule after the first step is never called.
    config.skip_nnmodule_hook_guards = False
