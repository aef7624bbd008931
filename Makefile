# The commands of the course. `make` alone lists them; the README has the same steps without make.
#
#   PYTHON=python3.12   the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=...     a package index to take torch from, for a CPU-only build of it

PYTHON ?= python3
TORCH_INDEX ?=
export TORCH_INDEX

RUN := .venv/bin/python
CELL_SECONDS := 300
NOTEBOOKS := notebooks $(wildcard book/*.ipynb)

.PHONY: help python setup setup-tests book test lab studies bench clean distclean

help:
	@echo "make book     execute every notebook and build the book into _build/html"
	@echo "make test     run everything that must pass"
	@echo "make lab      open JupyterLab"
	@echo "make studies  run the long experiments that pages show as recorded (hours; resumes)"
	@echo "make bench    compare the course's code with its peers"
	@echo "make clean    delete what was built; 'make distclean' also deletes .venv"

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "no '$(PYTHON)' here. Install Python 3.11 or newer, or say: make book PYTHON=python3.12"; \
	  exit 1; }

setup: python
	@$(PYTHON) tools/install.py

setup-tests: python
	@$(PYTHON) tools/install.py --tests

book: setup
	@$(RUN) tools/book.py

test: setup-tests
	@echo "==> style"
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) tools/assets.py
	@echo "==> the package and the book's pages"
	@$(RUN) -m pytest companion -rs
	@echo "==> every notebook, once (a cell may take $(CELL_SECONDS) s)"
	@mkdir -p _build
	@$(RUN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=$(CELL_SECONDS) \
	  --junitxml=_build/notebooks.xml $(NOTEBOOKS)
	@$(RUN) tools/executed.py _build/notebooks.xml $(NOTEBOOKS)

lab: setup
	@echo "==> opening JupyterLab; Ctrl-C here ends it"
	@$(RUN) -m jupyterlab notebooks

studies: setup
	@echo "==> long experiments; Ctrl-C stops them, the same command goes on where they were"
	@$(RUN) -m companion.studies

bench: setup-tests
	@echo "==> benchmarks: leave the machine alone meanwhile"
	@$(RUN) -m companion.bench

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find companion notebooks tools book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv book/_static/vendor *.egg-info
