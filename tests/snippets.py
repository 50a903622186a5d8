"""Python blocks of a Markdown file, as the program that a reader would type in."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^(?:<!-- file: (?P<file>\S+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[str | None, str, int]]:
    """(file that the block shows or None, code, offset of the code) of each Python block."""
    return [(match["file"], match["code"], match.start("code")) for match in _BLOCK.finditer(text)]


def program(text: str) -> str:
    """All blocks that show no file, in order; blank lines in between give every line its number in the document."""
    code = ""
    for file, block, start in python_blocks(text):
        if not file:
            code += "\n" * (text.count("\n", 0, start) - code.count("\n")) + block
    return code


def run(code: str, name: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, from a file `name` in `folder`; what it writes ends up there too."""
    script = folder / name
    script.write_text(code, encoding="utf-8")
    return subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True)
