# Everything runs in .venv, which `make setup` makes and which the other targets check first.
PYTHON ?= python3
DEVICE ?= auto
JOBS ?= 2
VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo doctor test test-all test-versions lint format bench docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12    the interpreter .venv is made with (3.11 or later)"
	@echo "  DEVICE=cpu|cuda      which vLLM to install; auto: cuda where nvidia-smi finds a GPU"
	@echo "  JOBS=2                processes that run tests side by side; 0: in this one"
	@echo "  PIP_EXTRA_INDEX_URL  read by pip; where it finds no CPU torch, setup tries"
	@echo "                       https://download.pytorch.org/whl/cpu, or the index you name here"

setup:  ## make .venv with vLLM and this package in it (quick when nothing changed)
	@$(PYTHON) tools/setup_env.py --device $(DEVICE)

demo: setup  ## serve the embedded model and compare budgets 1.0, 0.75 and 0.5
	@$(VENV)/vllm-buddy demo

doctor: setup  ## check that the installation works, and say what to do where it does not
	@$(VENV)/vllm-buddy doctor

test: setup  ## the fast tests
	@$(VENV)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: setup  ## all tests, also the slow ones
	@$(VENV)/python -m pytest -m "slow or not slow"

test-versions: setup  ## golden tests with each older vLLM that is supported, 20 minutes a version
	@$(VENV)/python -m tools.versions

lint: setup  ## ruff and mypy
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

format: setup  ## let ruff rewrite what it can
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

bench: setup  ## the short form of the main benchmarks, under 20 minutes on 2 cores
	@$(VENV)/python -m benchmarks.run

docs: setup  ## docs/ as a site in results/site; fails on a warning
	@$(VENV)/python -m pip install --quiet --no-build-isolation -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --quiet

clean:  ## remove builds and caches; .venv stays (rm -rf .venv to start over)
	rm -rf build dist *.egg-info results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vllm_buddy kernels tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
