# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test test-quick test-backbones test-recipes bench format clean

demo: .venv/installed  ## train and evaluate the comparison of the README: results in runs/demo
	$(BIN)/rein demo --out runs/demo

test: .venv/installed  ## format, lint, types and the whole test suite
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS)

test-quick: .venv/installed  ## the tests of the core: adapter, injection, files, heads, layout; under two minutes
	$(BIN)/python -m pytest -n $(JOBS) -m "not sweep and not slow" tests --ignore tests/dgss --ignore tests/bench

test-backbones: .venv/installed  ## every model name of timm, on meta tensors: about ten minutes
	$(BIN)/python -m pytest -m sweep tests/test_all_backbones.py

test-recipes: .venv/installed  ## one training step of every recipe, and every corruption: some minutes
	$(BIN)/python -m pytest -m sweep tests/dgss

bench: .venv/installed  ## a sample of every benchmark, some minutes: results in runs/bench
	$(BIN)/python -m benchmarks --out runs/bench

format: .venv/installed
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
