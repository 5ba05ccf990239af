PYTHON ?= python3

.PHONY: setup test lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

test: setup
	.venv/bin/python -P -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
