# Two commands do everything: `make run` (a child of the embedded parent, from nothing) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install run test lint lock

install: $(STAMP)

# torch goes first and alone: with its exact version in place, nothing else pulls in another build of it.
$(STAMP): requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	touch $@

run: $(STAMP)
	@python -c 'from puzzle_core.config import register_params; register_params()'   # names the nearest preset; DVC would not
	dvc repro
	dvc metrics show
	python -m stages.report out=data

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup -q

lock: $(STAMP)
	$(BIN)/python -m pip freeze | sed 's/+cpu//' | grep -v '^pip==\|^setuptools==' > requirements.lock
