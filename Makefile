# make demo, make test: all a user needs. Every target makes .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check docs fuzz notebooks package clean

demo: .venv/installed
	$(BIN)/retrofit demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: .venv/installed-dev
	$(BIN)/python tests/fuzz.py --networks 5000
	$(BIN)/python tests/fuzz_files.py --files 5000

notebooks: .venv/installed-dev
	$(BIN)/python scripts/run_notebooks.py

package: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/try_wheel.py dist/*.whl

clean:
	rm -rf .venv build dist site retrofit-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs,notebooks]'
	touch $@
