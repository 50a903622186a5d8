"""docs/ holds no code that doesn't run: the Python blocks of a page, in order, are one program."""

import tomllib

import pytest
from snippets import ROOT, program, python_blocks, run

from rewriter.library import ENTRY_POINTS

PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_there_are_pages():
    assert {"patterns.md", "report.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_found(page):
    text = page.read_text("utf-8")
    assert len(python_blocks(text)) == text.count("```python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path):
    done = run(program(page.read_text("utf-8")), f"{page.stem}_page.py", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_shown_is_the_one_that_is_read():
    text = (ROOT / "docs" / "patterns.md").read_text("utf-8")
    shown = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    assert list(shown["project"]["entry-points"]) == [ENTRY_POINTS]
