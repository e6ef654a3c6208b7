# Every target does its own set-up in .venv; the second call finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu clean
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

# On a machine with a GPU, with the Python that is there: builds, tests and measures as much as fits into ten minutes;
# called again, it goes on. make gpu PARTS="topk adam" does these parts only; PARTS takes options too.
gpu:
	$(PYTHON) benchmarks/gpu $(PARTS)

clean:
	rm -rf $(VENV) build *.egg-info gradsel_kernels/_C*.so gradsel_kernels/*.fatbin

# The dependencies, then the package itself (editable) with its extension. Build tools come first, because the
# package is built without isolation: after a change in csrc/ nothing is downloaded, and ninja compiles what includes
# the changed file. On Linux the tools include nvcc where there is none: CUDA kernels are compiled on every machine,
# even one that cannot run them.
$(VENV)/dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11 ninja torch
	[ "$$(uname)" != Linux ] || command -v nvcc >/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt nvidia-cuda-nvcc
	touch $@

$(VENV)/built: export GRADSEL_REQUIRE_CUDA := $(if $(filter Linux,$(shell uname)),1)
$(VENV)/built: $(VENV)/dependencies setup.py $(shell find csrc -type f)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
