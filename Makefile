# make demo   sets up and fine-tunes a small model under a budget
# make test   sets up and passes the tests
# make check  lint, types and tests, as continuous integration runs them

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint check clean

demo: $(VENV)/.ready
	@echo "==> fine-tuning the demo model under half of the memory it would take untouched (at most 3 minutes)"
	$(BIN)/tapeline train --budget 50% --output_dir runs/demo --overwrite_output_dir

test: $(VENV)/.ready
	@echo "==> running the tests (CPU, offline, a few minutes)"
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

$(VENV)/.ready: pyproject.toml
	@echo "==> setting up $(VENV) with $(PYTHON): needs Python 3.11 or later, and a few minutes for the downloads"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tapeline needs Python 3.11 or later, found " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "==> installing $(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "==> installing tapeline and what it needs"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
