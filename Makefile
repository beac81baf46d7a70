.PHONY: help demo test check chaos bench format clean

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal
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
	$(PYTEST)

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

chaos: .venv/dev.stamp
	$(BIN)/python -m tests.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks.throughput $(BENCH)

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out

# Stamps, since the demo needs none of the development tools, and only the benchmarks those of others.
.venv/run.stamp: extra =
.venv/dev.stamp: extra = [dev]
.venv/bench.stamp: extra = [bench]
.venv/%.stamp: pyproject.toml constraints.txt
	@echo "Installing into .venv: a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(extra)'
	@touch $@ .venv/run.stamp
