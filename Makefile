# Each target makes its own environment in .venv and needs only Python and make.
PYTHON ?= python3
JOBS ?= 2
MODELS ?= 10000
DEMO ?= --out build
BENCH ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?= constraints.txt
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS)

.PHONY: demo test fuzz bench bench-monitors bench-privacy docs lint format clean

demo: $(VENV)/demo.stamp
	$(BIN)/packext demo $(DEMO)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

fuzz: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/test_fuzz.py --fuzz-models=$(MODELS) -q

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks $(BENCH)

bench-monitors: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.diagnostics $(BENCH)

bench-privacy: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.privacy $(BENCH)

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "Documentation: build/site/index.html"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .hypothesis .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp says that an extra is installed as pyproject.toml and constraints.txt want it. BackPACK, with
# which tests and benchmarks compare, comes without its dependencies: only its examples use torchvision. So do
# curvlinops, laplace-torch and Cockpit, which depend on BackPACK; asdfghjkl is what laplace-torch imports. Of
# jax-privacy one file is read, which needs no JAX.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing packext[$*] into $(VENV)"
	$(INSTALL) --editable '.[$*]'
	$(if $(filter test bench,$*),$(INSTALL) --no-deps backpack-for-pytorch curvlinops-for-pytorch)
	$(if $(filter test,$*),$(INSTALL) --no-deps laplace-torch asdfghjkl)
	$(if $(filter bench,$*),$(INSTALL) --no-deps cockpit-for-pytorch jax-privacy)
	@touch $@
