# make demo   installs the stack, pre-trains a small BERT, exports it and fills in some masks;
#             ARGS=--steps=40 for a short one
# make test   installs what tests need, lints, builds the documentation, runs the tests
# make test-slow  the tests that `make test` leaves out, 13 to 25 minutes on two free cores
# make lint   ruff, and mypy on the library
# make docs   builds the documentation site into docs/_build; a warning is an error
# make links  asks each other site that the documentation links to; needs a network
# make soak   kills a run twenty times, and compares it with one that nothing stopped;
#             ARGS=--storage=ram or file: on object storage
# make tpu    a TPU VM's packages into .venv-tpu, then looks whether training can start
# make preflight  compiles the recipes for TPU pods and generations, no TPU needed, and writes
#             docs/results/preflight.md and generations.md
# make preflight-tpu  installs into .venv-tpu what --preflight_strict asks
# make bench  times an update beside its peers; ARGS=--json=FILE writes the figures, too
#             (inputs: .venv/bin/python -m benchmarks.inputs --text=... --vocab=...)

PYTHON ?= python3
VENV := .venv
TPU_VENV := .venv-tpu
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10
PIP := $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test test-slow lint docs links soak tpu preflight preflight-tpu bench clean

demo: $(VENV)/train
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/test lint docs
	@# Two calls of two processes each. A process keeps the programs that XLA compiles: their memory,
	@# and their memory maps, of which Linux allows 65,530 for each process (vm.max_map_count).
	$(PYTEST) -m "not slow" tests/tf_lamb tests/test_*.py
	$(PYTEST) -m "not slow" tests --ignore=tests/tf_lamb --ignore-glob='tests/test_*.py'

test-slow: $(VENV)/test
	$(PYTEST) -m slow tests/tf_lamb tests/test_*.py
	$(PYTEST) -m slow tests --ignore=tests/tf_lamb --ignore-glob='tests/test_*.py'

soak: $(VENV)/train
	$(BIN)/python tests/soak.py $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/sphinx-build -q -W --keep-going -E -b html docs docs/_build

links: $(VENV)/docs
	$(BIN)/sphinx-build -q -b linkcheck docs docs/_build/links

tpu: $(TPU_VENV)/installed
	$(TPU_VENV)/bin/python -m preflight.doctor

preflight: $(VENV)/preflight
	$(BIN)/python -m preflight.document
	$(BIN)/python -m preflight.generations

# TensorFlow's own TPU kernels, for --preflight_strict; no TPU needed.
preflight-tpu: $(TPU_VENV)/installed

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.optimizers $(ARGS)

# A stamp per set of packages: a second call installs nothing.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) -e .[train]
	touch $@

$(VENV)/preflight: $(VENV)/train
	$(PIP) -e .[train,preflight]
	touch $@

$(VENV)/test: $(VENV)/train
	$(PIP) -e .[train,test,preflight,examples,mlperf]
	touch $@

$(VENV)/docs: $(VENV)/train
	$(PIP) -e .[train,preflight,bench,docs]
	touch $@

$(VENV)/bench: $(VENV)/train
	$(PIP) -e .[train,bench]
	touch $@

# No dependencies are followed: those of the other packages name the stock `tensorflow`, which would
# be written over `tensorflow-tpu`. The list has all of them.
$(TPU_VENV)/installed: constraints-tpu.txt
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install --disable-pip-version-check --quiet --no-deps \
		-r constraints-tpu.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(TPU_VENV) build dist docs/_build *.egg-info
