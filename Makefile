# make demo, make test: all a user needs. Every target makes .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check fuzz notebooks clean

demo: .venv/installed
	$(BIN)/retrofit demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: .venv/installed-dev
	$(BIN)/python tests/fuzz.py --networks 5000

notebooks: .venv/installed-notebooks
	$(BIN)/python scripts/run_notebooks.py

clean:
	rm -rf .venv build retrofit-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-notebooks: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@
