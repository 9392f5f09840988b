# Everything happens in .venv, which `make venv` creates from the pins in constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

# One thread for each of the processes: the matrices are small. Worksteal gives each a
# contiguous share of the tests, so that few fixtures are made twice.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv dev test test-all lint types format docs doctest bench experiments demo tutorials pretrained package clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Install the library and its test tools into .venv
	@:

dev: $(VENV)/.installed-dev ## Add the linter, the type checker and the optional backends
	@:

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes when it is new)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

test: venv ## Run the tests in WORKERS=2 processes, except slow ones and those for a GPU
	$(PYTEST)

test-all: venv ## Run the slow tests too
	$(PYTEST) -m "not gpu"

lint: dev ## Check style and formatting
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

types: dev ## Check types
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

format: dev ## Fix style and formatting in place
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

docs: dev ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees -b html docs docs/_build/html

doctest: dev ## Run the examples in the documentation
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees -b doctest docs docs/_build/doctest

bench: venv ## Time the networks and the simulator against the paper's
	$(BIN)/python -m pytest benchmarks/perf --benchmark-only --benchmark-autosave --benchmark-columns=median,iqr,ops,rounds

experiments: $(VENV)/.installed-dev ## Run the paper's experiments at the budget quick and write benchmarks/REPORT.md
	$(BIN)/python -m benchmarks run --budget quick
	$(BIN)/python -m benchmarks figures
	$(BIN)/python -m benchmarks report

demo: venv ## Run the demo into demo/; X=FILE gives it an observation
	$(BIN)/python -m sbi_slotflow.demo --out demo $(if $(X),--x "$(X)")

tutorials: dev ## Run the tutorials in full and save their outputs; NAME=03 for one
	$(BIN)/python tutorials/build.py $(NAME)

pretrained: venv ## Train a set of shipped weights anew; NAME=sinusoids-tiny, say
	$(BIN)/python -m sbi_slotflow.pretrained $(NAME) --out sbi_slotflow/weights

package: dev ## Build wheel and source distribution into dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## Remove caches, builds and what the demo wrote; .venv and files of yours stay
	rm -rf build dist docs/_build docs/report docs/tutorials .benchmarks benchmarks/figures benchmarks/smoke .pytest_cache .ruff_cache
	rm -f demo/training.safetensors $(foreach f,posterior.nc corner.png reconstruction.png spectrum.png,demo/$(f) demo/paper/$(f))
	-rmdir demo/paper demo 2>/dev/null
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
