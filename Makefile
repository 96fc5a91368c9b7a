# Valley: `make help` lists what can be done. Everything runs inside .venv; nothing else on the machine is touched.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
CLIPS ?= 160
MODEL ?= runs/demo/finetune

export PATH := $(CURDIR)/$(BIN):$(PATH)
export VALLEY_HOME ?= $(CURDIR)
export RAY_USAGE_STATS_ENABLED ?= 0
# One maths thread a process: Ray runs as many processes as there are CPUs. The GPU's own threads are not touched.
export OMP_NUM_THREADS ?= 1

.PHONY: help venv samples demo compare serve browser check format test test-slow cluster cluster-stop mlflow benchmark clean

help: ## what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## build .venv with the tested versions

$(READY): pyproject.toml constraints.txt requirements-samples.txt
	@test -n "$(PYTHON)" || { echo "Valley needs Python 3.11 or newer: make PYTHON=/path/to/python venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirement requirements-samples.txt
	@touch $@

samples: samples/.ready ## make the sample clips and their dialogues

samples/.ready: $(READY)
	$(BIN)/python jobs/samples.py output=samples clips=$(CLIPS)
	@touch $@

demo: samples ## train the tiny model in both stages on the sample clips, on a local Ray cluster
	$(BIN)/python jobs/train.py --config tiny output=runs/demo

compare: samples ## compare v1, v2 and v3 of the tiny model, two seeds each, and write a report
	$(BIN)/python jobs/compare.py --config tiny output=runs/compare

serve: venv ## serve the demo's model: chat page on http://127.0.0.1:8000, OpenAI's API below /v1
	$(BIN)/python jobs/serve.py model=$(MODEL) clips=$(wildcard samples/clips)

browser: ## Chromium for the chat page's tests, where apt can install it; without it they are skipped
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		apt-get install --quiet --yes --no-install-recommends chromium >/dev/null || \
		echo "no Chromium: the chat page is not tested"

check: venv ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## write the formatting and the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What needs Ray is many processes in itself; two such tests beside each other take minutes longer.
test: venv ## the test suite
	$(BIN)/pytest -m "not slow and not ray" --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m "not slow and ray" --durations 10

test-slow: venv ## the tests that take longer
	$(BIN)/pytest -m slow

cluster: venv ## start a Ray cluster on this machine (token authentication on)
	cluster/local.sh start

cluster-stop: venv ## stop it, and every other Ray process of yours on this machine
	cluster/local.sh stop

mlflow: venv ## open the tracking page on http://127.0.0.1:5000
	dashboards/mlflow.sh

benchmark: venv ## measure decoding, the training step and serving against their peers
	$(BIN)/python jobs/benchmark.py decode
	$(BIN)/python jobs/benchmark.py train
	$(BIN)/python jobs/benchmark.py serve

clean: ## remove caches; runs, samples and .venv stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
