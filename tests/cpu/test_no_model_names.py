"""The compiler knows no model: no name that transformers gives to one, or to a submodule of one, is in it."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
FILES = sorted(f for folder in ("rewriter", "patterns", "kernels") for f in (ROOT / folder).rglob("*.py"))
# Words that mean something else: a digit, the Gaussian distribution function, a limit on numbers, the title of a paper.
HARMLESS = {"bit", "phi", "clip", "roformer"}
MODELS = {name.replace("-", "_") for name in CONFIG_MAPPING_NAMES} - HARMLESS
FAMILIES = r"llama|qwen|gemma|mistral|mixtral|deepseek|falcon|bloom|gpt|\bbert|\bt5\b|phi[-_]?\d"
FORBIDDEN = rf"model_type|architectures|(?:import|from)\s+transformers|transformers\.models|{FAMILIES}"


def submodules():
    """Names of two words that transformers gives to submodules, without those that PyTorch gives to functions."""
    names = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        names.update(re.findall(r"self\.(\w+)\s*=\s*(?:nn\.\w+|[A-Z]\w+)\(", file.read_text(encoding="utf-8")))
    return {n for n in names if "_" in n.strip("_")} - {*dir(torch), *dir(torch.nn.functional)}


SUBMODULES = submodules()


def found(text):
    words = {w.lower() for w in re.findall(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*", text.replace("-", "_"))}
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"\w+", node.value))
    return sorted((words & MODELS) | (names & SUBMODULES) | set(re.findall(FORBIDDEN, text, re.I)))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_name_of_a_model(file):
    assert found(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "if config.model_type == name: pass",
        "from transformers.models.auto import modeling_auto",
        "import transformers",
        "module.gate_proj(x)",
        "getattr(module, 'q_proj')",
        "name.endswith('self_attn.o_proj')",
        "# as Llama does",
        "kind = 'olmo2'",
        "class Qwen3Norm: pass",
    ],
)
def test_it_would_be_found(text):
    assert found(text)


def test_it_looks_at_everything():
    assert len(FILES) > 40 and len(MODELS) > 300 and len(SUBMODULES) > 1000
