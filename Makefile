# Two commands make and check everything: `make book` and `make test`. `make help` lists the rest.
# All paths are relative, so the folder may be called anything, with spaces too.

PY := .venv/bin/python
# PYTHON=/path/to/python chooses the Python that .venv is made with; by default the first of these that is new enough.
CANDIDATES := python3.11 python3.12 python3.13 python3
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.PHONY: help setup book test lab notebooks experiments pages lock clean

help:  ## this list
	@echo "Usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup:  ## create .venv and install everything; skipped when nothing has changed
	@for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec "$$python" tools/environment.py; \
		fi; \
	done; \
	echo "kdlib needs Python 3.11 or newer, with its venv module; tried: $(if $(PYTHON),$(PYTHON),$(CANDIDATES))." >&2; \
	echo "Install one (on Debian and Ubuntu: python3.11 and python3.11-venv) or name yours: make PYTHON=/path/to/python" >&2; \
	exit 1

book: setup  ## execute the chapters that have changed, then build the site into _build/html
	@$(PY) -m tools.book $(if $(FORCE),--force)

test: setup  ## check everything: lint, format, tests, outputs of the chapters
	@$(PY) -m tools.check

lab: setup  ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab chapters

notebooks: setup  ## execute the chapters and store their outputs in chapters/*.ipynb (FORCE=1: all of them)
	@$(PY) -m tools.book --store $(if $(FORCE),--force)

experiments: setup  ## run the studies on MiniGLUE as far as they have no records in data/runs (hours)
	@$(PY) -m kdlib study experiments/teachers.yml experiments/0*.yml

pages: setup  ## write the README's tables, docs/licences.md and docs/papers.md anew
	@$(PY) -m tools.readme
	@$(PY) -m tools.licences
	@$(PY) -m tools.ledger

lock: setup  ## resolve requirements.txt anew and write requirements.lock
	@$(PY) -m tools.lock

clean:  ## remove what was built, not .venv
	@rm -rf _build
	@mkdir _build
