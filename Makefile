.PHONY: help demo test check chaos bench format clean

PYTHON ?= python3
BIN := .venv/bin
KILLS ?= 300
BENCH ?= --json benchmarks/throughput.json

help:
	@echo "make demo    generate the demo dataset with two processes, in out/demo"
	@echo "make test    run the tests"
	@echo "make check   formatting, lint, types, tests"
	@echo "make bench   the job against what a user would run instead, side by side, some twenty minutes"
	@echo "make chaos   kill real jobs 300 times and compare what they leave, an hour or two; KILLS=20 SEED=7 as you like"

demo: .venv/run.stamp
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml batch_generate.py --device cpu --output_dir out/demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

chaos: .venv/dev.stamp
	$(BIN)/python -m tests.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks.throughput $(BENCH)

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out

# Two stamps: the demo needs none of the development tools.
.venv/run.stamp: pyproject.toml constraints.txt
	@echo "Installing into .venv: a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt
	@echo "Installing into .venv: a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/run.stamp

.venv/bench.stamp: pyproject.toml constraints.txt
	@echo "Installing into .venv: a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@ .venv/run.stamp
