PYTHON ?= python3
RUN := .venv/bin/python -P -m

.PHONY: setup demo test lint tables

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

demo: setup
	$(RUN) draftbench +method=draft sparsity=0.9

test: setup
	$(RUN) pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) draftbench.tables --check

tables: setup
	$(RUN) draftbench.tables
