# Every target does its own set-up in .venv; the second call finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/gradsel demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/plot_train_step.py
	$(BIN)/python benchmarks/select_memory.py

clean:
	rm -rf $(VENV) build *.egg-info gradsel_kernels/_C*.so

# The dependencies, then the package itself (editable) with its extension. Build tools come first, because the
# package is built without isolation so that a change in csrc/ costs one compilation and no download.
$(VENV)/dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11 torch
	touch $@

$(VENV)/built: $(VENV)/dependencies setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
