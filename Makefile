# make demo   installs the stack, pre-trains a small BERT, exports it and fills in some masks
# make test   installs what tests need, lints, runs all tests
# make lint   ruff alone
# make preflight  compiles the recipes for TPU pods, no TPU needed, and writes docs/preflight.md
# make bench  times an update beside its peers; ARGS=--json=FILE writes the figures, too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint preflight bench clean

demo: $(VENV)/train
	$(BIN)/python train.py

test: $(VENV)/test lint
	@# In two processes: each program that XLA compiles takes memory maps, and all the tests' together
	@# are more than Linux gives one process (vm.max_map_count, 65,530), which ends in a crash.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

preflight: $(VENV)/preflight
	$(BIN)/python -m training.preflight_document $(ARGS)

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
	$(PIP) -e .[train,test,preflight]
	touch $@

$(VENV)/bench: $(VENV)/train
	$(PIP) -e .[train,bench]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
