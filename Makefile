# `make` lists the targets. Each first installs what it needs and is not yet there.
PYTHON ?= python3

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Stamps: each says that a step of the set-up is done for the files that it depends on.
PACKAGES := $(VENV)/.packages-installed
HOROVOD  := $(VENV)/.horovod-installed
RECIPE   := $(wildcard danaz/horovod_install/recipe.py danaz/horovod_install/toolchain/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-rest test-all lint format soak bench-server bench-simulator bench-scale bench-shards bench-pipeline bench-step bench-overhead clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(HOROVOD) ## Create .venv with torch, danaz and Horovod (first time: 3 GB download, about 10 minutes)

demo: setup ## Train digits with SSGD, DANA and NAG-ASGD on this machine and compare them (3 minutes)
	$(BIN)/danaz compare configs/demo.yaml

# T=tests/x/test_y.py (files or folders) runs all tests there, the long ones too; K=words those whose names match.
T ?=
K ?=
PYTEST := $(BIN)/python -m pytest

test: setup ## Run the tests that show that danaz works (10 minutes on 2 cores); T=FILE runs one file, K=WORDS matching names
	$(PYTEST) $(if $(T)$(K),,-m "not slow") $(if $(K),-k "$(K)") $(T)

test-rest: setup ## Run the long tests that `make test` leaves out: soak, chaos, accuracy (40 minutes)
	$(PYTEST) -m slow

test-all: setup ## Run all tests, the long ones too (50 minutes)
	$(PYTEST)

soak: setup ## Train for 10 minutes while ranks, machines, links and the server fail (needs root; Linux)
	$(BIN)/python tests/support/soak.py --minutes 10 --faults 50 --epochs 800

lint: $(PACKAGES) ## Check style and types with ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy danaz launcher

format: $(PACKAGES) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-server: setup ## Measure the server and compare it with others (40 minutes; leave the machine alone meanwhile)
	$(BIN)/python benchmarks/server.py

bench-simulator: setup ## Measure a simulated update against a plain PyTorch loop (1 minute)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/simulator.py configs/digits.yaml

bench-scale: setup ## Measure how many workers one server can serve (2 minutes; leave the machine alone meanwhile)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scale.py

bench-shards: setup ## Measure a server cut into shards, each on a network link of its own (5 minutes; needs root; Linux)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/shards.py

bench-pipeline: setup ## Measure how much of an exchange --pipeline hides, and what it costs in accuracy (8 minutes; needs root; Linux)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/pipeline_accuracy.py configs/digits.yaml

bench-step: setup ## Measure a ResNet-50 step on a GPU with and without danaz (a few minutes; needs a GPU)
	$(BIN)/python benchmarks/step_gpu.py

bench-overhead: setup ## Measure what danaz costs a script that runs alone: ResNet-20 and a small GPT (4 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py

clean: ## Remove .venv, runs and caches, but keep the wheels in ~/.cache/danaz
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts in place.
$(BIN)/pip:
	@scripts/check_prerequisites.sh $(PYTHON)
	@echo "[1/3] Creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

$(PACKAGES): setup.cfg pyproject.toml constraints.txt | $(BIN)/pip
	@echo "[2/3] Installing torch and the other packages: about 3 GB to download, 6 GB on disk, some minutes"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(HOROVOD): $(PACKAGES) $(RECIPE)
	@echo "[3/3] Installing Horovod, compiled for this torch: about 4 minutes on 2 cores, seconds the next time"
	@$(BIN)/python -m danaz.horovod_install install --constraint constraints.txt
	@touch $@
