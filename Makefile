# `make demo` and `make test` work on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Some machines forbid compiled modules on disk: each process would compile PyTorch anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test fast lint docs real real-data real-methods real-prunings clean

demo: $(VENV)/.run  ## prune, realign and report on the bundled model
	$(BIN)/regraft demo --out demo-run

test: $(VENV)/.dev  ## all tests, slow ones included
	$(PYTEST)

fast: $(VENV)/.dev  ## unit tests only
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without --quiet, which would hide the warnings that --strict fails on.
docs: $(VENV)/.docs  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

DATA ?= ../data
# Calibration seeds, from 0 without gaps.
SEEDS ?= 0 1 2
SEED_RUNS := $(SEEDS:%=real-seed-%)
.PHONY: $(SEED_RUNS)
# Threads that wait would spin, and two runs with as many threads as cores slow each other tenfold.
real-data real-prunings real-methods $(SEED_RUNS): export OMP_WAIT_POLICY = passive
real: real-prunings real-methods  ## docs/methods.md on the model in runs/real-model; -j2 for two runs at once

real-data: $(VENV)/.run
	$(BIN)/python scripts/make_real_benchmark.py runs/real-model --data $(DATA) --out runs/real-data \
		--dtype bfloat16 --batch-size 64 --seeds $(words $(SEEDS))

$(SEED_RUNS): real-%: real-data
	$(BIN)/regraft run recipes/real-methods.yaml --out runs/real-methods --only $*

real-methods: $(SEED_RUNS)
	$(BIN)/regraft report runs/real-methods

real-prunings: real-data
	$(BIN)/regraft run recipes/real-prunings.yaml --out runs/real-prunings

clean:  ## remove everything that make creates
	rm -rf $(VENV) demo-run site .cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing regraft and its dependencies into $(VENV) (once; PyTorch is large) ..."
	$(BIN)/python -m pip install --progress-bar on -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing regraft with its test tools into $(VENV) (once; PyTorch is large) ..."
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing regraft with its documentation tools into $(VENV) (once; PyTorch is large) ..."
	$(BIN)/python -m pip install --progress-bar on -e '.[docs]'
	touch $@ $(VENV)/.run

$(VENV)/.all: pyproject.toml | $(BIN)/python
	@echo "Installing regraft with all its tools into $(VENV) (once; PyTorch is large) ..."
	$(BIN)/python -m pip install --progress-bar on -e '.[dev,docs]'
	touch $@ $(VENV)/.run $(VENV)/.dev $(VENV)/.docs
