# The commands of README.md. Each target first makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# One thread for each of the two test processes: on two cores more threads only get in the way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

test: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m pytest $$($(BIN)/python -c 'import xdist' && echo "-n 2") $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("graphgrow needs Python 3.11 or newer; say which with make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that a machine set up for the CPU build gets the CPU build.
$(VENV)/.torch: requirements/torch.txt | $(BIN)/python
	$(PIP) -r requirements/torch.txt
	@touch $@

$(VENV)/.demo: requirements/base.txt requirements/demo.txt pyproject.toml $(VENV)/.torch
	$(PIP) -r requirements/demo.txt
	$(PIP) --no-deps --editable .
	@touch $@

# torchvision without its dependencies: the index's own pin would replace a CPU build of torch.
$(VENV)/.test: requirements/test.txt requirements/torchvision.txt $(VENV)/.demo
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/torchvision.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.test
	$(PIP) -r requirements/dev.txt
	@touch $@
