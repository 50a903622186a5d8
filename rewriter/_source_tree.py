"""Makes `rewriter.kernels` and `rewriter.patterns` importable from a source tree, editable install or plain checkout.

There `kernels/` and `patterns/` lie beside `rewriter/`; a wheel has them inside it, and then nothing is to be done.
(Setuptools' editable finder can't serve a sub-package without `__init__.py` that lies outside its parent's folder.)
"""

import sys
from pathlib import Path


def search_path() -> list[str]:
    """What `rewriter.__path__` needs besides the package's own folder: nothing, or the root of the source tree."""
    package = Path(__file__).parent
    inside = all((package / name).is_dir() for name in ("kernels", "patterns"))
    return [] if inside else [str(package.parent)]


sys.modules["rewriter"].__path__ += search_path()
