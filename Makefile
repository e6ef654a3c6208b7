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
	$(BIN)/python -m benchmarks.training.train_step
	$(BIN)/python -m benchmarks.selection.select_memory
	$(BIN)/python -m benchmarks.draw

# On a machine with a GPU, with the Python that is there: builds, tests and measures as much as fits into ten minutes.
# Rerun it to resume. make gpu PARTS="topk adam" does these parts only; PARTS takes options too.
gpu:
	PYTHONPATH=.:python $(PYTHON) -m benchmarks.gpu $(PARTS)

clean:
	rm -rf $(VENV) build *.egg-info gradsel_kernels/_C*.so gradsel_kernels/*.fatbin

# The dependencies, then the package itself (editable) with its extension. Build tools come first, because the
# package is built without isolation so that a change in csrc/ costs one compilation and no download. On Linux they
# include nvcc, if there is none: CUDA kernels are compiled on every machine, also where nothing can run them.
$(VENV)/dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11 torch
	[ "$$(uname)" != Linux ] || command -v nvcc >/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt nvidia-cuda-nvcc
	touch $@

$(VENV)/built: export GRADSEL_REQUIRE_CUDA := $(if $(filter Linux,$(shell uname)),1)
$(VENV)/built: $(VENV)/dependencies setup.py $(wildcard csrc/* csrc/cuda/*)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
