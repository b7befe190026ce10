# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
QUICK := adapter refinement stagewise config conformance parameters layout checkpoint injection
DEVICE ?= cuda
AMOUNT ?= --full
GPU_RESULTS ?= $(if $(filter --tiny,$(AMOUNT)),runs/gpu-tiny,benchmarks/results/gpu)
CORE := -m "not sweep and not slow" tests --ignore tests/dgss --ignore tests/bench

.PHONY: demo docs test test-quick test-backbones test-recipes fuzz test-oldest test-newest dist test-dist bench bench-gpu format clean

demo: .venv/installed  ## train and evaluate the comparison of the README: results in runs/demo
	$(BIN)/rein demo --out runs/demo

test: .venv/installed  ## format, lint, types and the whole test suite
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS)

test-quick: .venv/installed  ## the tests of the core: adapter, injection, files, heads, layout; under two minutes
	$(BIN)/python -m pytest -n $(JOBS) -m "not sweep and not slow" $(addprefix tests/test_,$(addsuffix .py,$(QUICK)))

test-backbones: .venv/installed  ## every model name of timm, on meta tensors, and every check of the slow families: about ten minutes
	$(BIN)/python -m pytest -m sweep tests/test_all_backbones.py tests/test_families.py

test-recipes: .venv/installed  ## one training step of every recipe, every corruption, and the rest of the sweep: some minutes
	$(BIN)/python -m pytest -m sweep tests --ignore-glob '*fuzz*' --ignore tests/test_all_backbones.py --ignore tests/test_families.py \
		--ignore tests/test_crashes.py

fuzz: .venv/installed  ## every reader of files with thousands of damaged files, and 200 kills while saving: about half an hour
	$(BIN)/python -m pytest -n $(JOBS) -m sweep tests/test_fuzz_files.py tests/dgss/test_fuzz_runs.py tests/dgss/data/test_fuzz_data.py tests/test_crashes.py

test-oldest: .venv-oldest/installed  ## the tests of the core with the lowest versions that pyproject.toml claims
	.venv-oldest/bin/python -m pytest -n $(JOBS) $(CORE)

test-newest: .venv-newest/installed  ## the whole suite with the newest versions that pyproject.toml allows
	.venv-newest/bin/python -m pytest -n $(JOBS)

dist: .venv/installed  ## source distribution and wheel: dist/
	rm -rf dist
	$(BIN)/python -m build --quiet

test-dist: dist  ## install what `make dist` built into empty environments: alone, with each extra, and from the sources
	$(BIN)/python tests/dist.py dist

bench: .venv/installed  ## a sample of every benchmark, some minutes: results in runs/bench
	$(BIN)/python -m benchmarks --out runs/bench

bench-gpu: .venv/installed  ## everything that a GPU can tell: speed, then generalisation with a wider backbone; resumes when run again
	$(BIN)/python -m pytest -n 0 -m gpu
	$(BIN)/python -m benchmarks recipe plan throughput memory scaling routing data $(AMOUNT) --device $(DEVICE) --dtype bfloat16 \
		--resume --minutes 25 --out $(GPU_RESULTS); speed=$$?; \
	$(BIN)/python -m benchmarks.pocket.wider $(filter --tiny,$(AMOUNT)) --device $(DEVICE) --out $(GPU_RESULTS) && exit $$speed

docs: .venv/installed  ## the documentation, in docs/_build; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

format: .venv/installed
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

clean:
	rm -rf .venv .venv-oldest .venv-newest runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# uv shares the files of packages between environments, so that these take little time and space
.venv-oldest/installed: .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	$(BIN)/uv pip compile --quiet --python $(BIN)/python --resolution lowest-direct --extra dev -o .venv-oldest/versions.txt pyproject.toml
	$(BIN)/uv pip install --quiet --python .venv-oldest --requirements .venv-oldest/versions.txt
	$(BIN)/uv pip install --quiet --python .venv-oldest --no-deps --editable .
	touch $@

.venv-newest/installed: .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest --upgrade --editable '.[dev]'
	touch $@
