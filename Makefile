# Every target sets up what it needs in .venv, once. The first call downloads torch, which takes minutes on a slow line.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
JOBS ?= 2

.PHONY: demo test test-oldest lint docs dist bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/gradsel demo

# In JOBS processes at once, each with one thread unless a test asks for more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup

# The suite on the oldest torch that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/built
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses $(JOBS) --dist loadgroup

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/.
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

# The source distribution, the wheel that it builds, and tests of this wheel outside of the repository's folders.
dist: $(VENV)/built
	rm -rf dist build/installed
	$(BIN)/python -m build
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed dist/*.whl
	cp -r tests build/installed && touch build/installed/pytest.ini
	cd build/installed && OMP_NUM_THREADS=1 ../../$(BIN)/python -m pytest -q \
		tests/test_installed.py tests/kernels tests/gradsel/nn/test_training.py

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks.training.train_step
	$(BIN)/python -m benchmarks.training.overhead
	$(BIN)/python -m benchmarks.training.peft_layers
	$(BIN)/python -m benchmarks.optimizer.targets
	$(BIN)/python -m benchmarks.selection.select_memory
	$(BIN)/python -m benchmarks.draw

# On a machine with a GPU, with the Python that is there: builds, tests and measures as much as fits into ten minutes;
# rerun it to resume. make gpu PARTS="topk adam" runs these parts only; PARTS takes options too.
gpu:
	PYTHONPATH=.:python $(PYTHON) -m benchmarks.gpu $(PARTS)

clean:
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info gradsel_kernels/_C*.so gradsel_kernels/*.fatbin

# Build tools come first, because the package is built without isolation so that a change in csrc/ downloads
# nothing, and ninja compiles only what includes the changed file.
$(VENV)/dependencies: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) 'setuptools>=77' pybind11 ninja torch
	touch $@

# On Linux, tests and benchmarks compile the CUDA kernels, also where nothing can run them.
$(VENV)/nvcc: $(VENV)/dependencies
	[ "$$(uname)" != Linux ] || command -v nvcc >/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) nvidia-cuda-nvcc
	touch $@

# The package itself, editable, with its extension and what one kind of work needs: each stamp is an extra, but for
# "built", which is everything that tests, lint and benchmarks need.
$(VENV)/demo: EXTRA := demo
$(VENV)/docs: EXTRA := docs
$(VENV)/built: EXTRA := dev
$(VENV)/built: $(VENV)/nvcc
$(VENV)/built: export GRADSEL_REQUIRE_CUDA := $(if $(filter Linux,$(shell uname)),1)
$(VENV)/demo $(VENV)/docs $(VENV)/built: $(VENV)/dependencies setup.py $(shell find csrc -type f)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[$(EXTRA)]'
	touch $@
