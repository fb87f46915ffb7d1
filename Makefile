# make demo   quantize a small model and show the report
# make test   lint, types, layers and all tests but the slow ones
#
# PYTHON       the interpreter to build .venv with (3.10 or newer)
# PIP_ARGS     more arguments for pip, such as the index of PyTorch's CPU wheels
# PYTEST_ARGS  more arguments for pytest

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Settings, not code: the install is editable, so only these make it stale.
SETUP := pyproject.toml constraints.txt fxquant/_version.py
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: help demo test lint format slow test-poisoned accuracy pre-commit clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.stamp-zoo
	$(BIN)/fxquant demo

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# What the README promises on real networks: top-1, agreement, noise, parity. Needs the data folder.
accuracy: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m slow tests/integration/test_accuracy.py $(PYTEST_ARGS)

# The same tests where torch.ao can no longer be used; tests/conformance compares with it throughout.
test-poisoned: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -p tests.poison_torch_ao --ignore tests/packaging --ignore tests/conformance $(PYTEST_ARGS)

pre-commit: $(VENV)/.stamp-dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# setuptools comes from the constraints too, so nothing unpinned builds the package.
$(VENV)/.stamp-venv:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fxquant needs Python 3.10 or newer; choose one with PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.stamp-zoo: $(VENV)/.stamp-venv $(SETUP)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e '.[zoo]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv $(SETUP)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e '.[zoo,dev]'
	@touch $@ $(VENV)/.stamp-zoo
