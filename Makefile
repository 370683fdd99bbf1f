# Everything is done from here; `make help` prints what there is.
.DEFAULT_GOAL := help
.PHONY: help setup demo up down test test-all lint docs chaos bench pocket

VENV := .venv
READY := $(VENV)/.ready
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$p"; break; }; done)

help: ## Print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Make the virtual environment and install everything; quick when it is there

$(READY): requirements.txt $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; install it or say where it is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV) || { echo "This Python cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $(READY)

demo: setup ## Start everything, make a dozen images, check them, show the audit trail, stop
	./darkroom demo

up: setup ## Start everything and keep it running
	./darkroom up --detach

down: setup ## Stop everything; data stay in .darkroom
	./darkroom down

test: setup ## Run the tests
	$(VENV)/bin/python -m pytest --numprocesses 2 --durations 15 --dist loadfile

test-all: setup ## Run the slow tests as well
	$(VENV)/bin/python -m pytest --numprocesses 2 --durations 15 --dist loadfile -m ""

lint: setup ## Style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup ## Make a site of the documents in .darkroom/site; a broken link is an error
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	$(VENV)/bin/python -m mkdocs build --strict

chaos: setup ## Break everything on purpose, over and over, and check that no job is lost or doubled
	$(VENV)/bin/python -m benchmarks.chaos

bench: setup ## Run every benchmark
	@for main in benchmarks/*/__main__.py; do \
		name="benchmarks.$$(basename "$$(dirname "$$main")")"; \
		echo "== $$name"; $(VENV)/bin/python -m "$$name" || exit 1; \
	done

pocket: setup ## Train the pocket model again
	$(VENV)/bin/python -m pocket.train
