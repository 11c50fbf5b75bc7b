# `make demo` and `make test` do all their own set-up; `make check` is the one door for a developer.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 60
ONE_HALF := $(addprefix tests/,bench doctor fuzz methods networks pipeline plan results runs tasks)

.PHONY: demo test test-one-half test-other-half check fuzz gpu study sweep format lint types clean

demo: .venv/installed
	$(BIN)/localpipe train configs/demo.yaml

# Two halves side by side: the tests wait as often as they compute.
test: .venv/installed-dev
	$(MAKE) --jobs 2 test-one-half test-other-half

test-one-half:
	$(BIN)/python -m pytest $(ONE_HALF)

test-other-half:
	$(BIN)/python -m pytest $(addprefix --ignore=,$(ONE_HALF))

# What the CUDA devices of this machine do, in eight minutes: GPU="--minutes 4 --out DIR".
gpu: .venv/installed
	$(BIN)/localpipe doctor --gpu $(GPU)

# Every method on one small protocol; resumable, about an hour and a half a seed on two cores.
study: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/study.py $(STUDY)

# Every pair of the keys' values, through every command, as far as it gets: MINUTES=60.
sweep: .venv/installed-dev
	$(BIN)/python -m tests.sweep --minutes $(MINUTES) $(SWEEP)

check: .venv/installed-dev format lint test

# Odd configurations and data: FUZZ="--seed 1 --minutes 10" draws others, for less time.
fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

format:
	$(BIN)/ruff format --check localpipe tests examples

lint: .venv/installed-dev types
	$(BIN)/ruff check localpipe tests examples
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch .ci/run
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/yamllint --strict .
	$(BIN)/python -m pytest tests/test_links.py

types: .venv/installed-dev
	$(BIN)/mypy

.venv/installed: setup.cfg setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
