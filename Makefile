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

# One process a core, one thread each: more threads would wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --dist worksteal

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) draftbench.tables --check

tables: setup
	$(RUN) draftbench.tables
