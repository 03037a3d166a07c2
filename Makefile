# Works from a clone with nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_WORKERS ?= 2

.PHONY: help demo test test-all torture quality style bench sweep docs clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "left_trainer needs Python 3.11 or newer. Name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Fine-tune the embedded model with LoRA and print the results
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/lora_summarization.py --overwrite_output_dir

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test-all: $(INSTALLED) ## Run all tests, including the long ones
	TEST_FRESH_PROCESSES=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "long or not long"
	TEST_MODEL_TYPES="bart opt" $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal tests/methods/test_method_invariants.py

torture: $(INSTALLED) ## Try to lose a run: kills, damage, full disks, bad input (TORTURE="--minutes 10")
	PYTHONPATH=tests/support $(BIN)/python -m torture $(TORTURE)

quality: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED) ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Run all benchmarks against the plain stack that this machine supports
	$(BIN)/python benchmarks/race.py

sweep: $(INSTALLED) ## Measure learning rates of every method on the embedded models
	$(BIN)/python benchmarks/learning_rates.py

docs: $(INSTALLED) ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and build outputs
	rm -rf $(VENV) build dist site *.egg-info
