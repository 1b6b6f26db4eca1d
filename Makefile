# Two commands: `make train` and `make test`. Each makes its own environment in .venv and needs Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEST_FLAGS ?= -n auto -m "not slow"

.PHONY: train test lint docs clean

train: $(VENV)/.train
	$(BIN)/python scripts/train.py $(TRAIN_FLAGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	$(BIN)/python docs/check_links.py build/docs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[plot,data]"
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[plot,data]" --group test
	touch $@

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[plot,data]" --group lint
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[plot,data]" --group docs
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
