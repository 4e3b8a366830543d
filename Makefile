# Paceline's commands. `make` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where pip finds the CPU build of torch, when no index or folder that pip already knows has it (see README).
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --timeout 20 --retries 2
REQUIREMENTS := deploy/requirements
export PYTHONUNBUFFERED := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check static pure prove chaos clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/.dev ## build .venv from the pinned requirements (CPU), tests and checks included

$(VENV)/.cpu: $(REQUIREMENTS)/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Paceline needs Python 3.11; $(PYTHON) is another: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (CPU build)"
	@$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(PIP) install --no-deps "$$(grep '^torch==' $<)" || \
	  { echo "error: the CPU build of torch was not found. It is in PyTorch's own package index, not in the default one:"; \
	    echo "       make install TORCH_INDEX=<the CPU index that pytorch.org shows under Get started, Linux, Pip, CPU>"; exit 2; }
	@echo "installing $$(grep -c '==' $<) pinned packages"
	$(PIP) install --no-deps -r $<
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS)/dev.txt $(VENV)/.cpu
	$(PIP) install --no-deps -r $<
	@touch $@

# Everything is made here. (A comment behind the value would be part of it, blanks and all, and `1  ` is no `1`.)
demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.cpu ## train a tiny model on this CPU: supervised warm-up, then asynchronous GRPO (about 5 minutes)
	$(PY) -m deploy train recipes/demo_sft.yaml --overwrite
	$(PY) -m deploy train recipes/demo.yaml --overwrite

check: $(VENV)/.dev ## ruff, types, architecture and the pure tests, side by side (about 5 minutes)
	@$(MAKE) --no-print-directory -j2 --output-sync=target static pure

static: $(VENV)/.dev ## ruff, types, architecture, Dockerfiles
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint deploy/Dockerfile deploy/Dockerfile.cpu

# A process for each of two cores, and a thread for each process.
pure: export OMP_NUM_THREADS := 1
pure: $(VENV)/.dev ## the tests that start no Ray, vLLM or DeepSpeed, in two processes
	$(PY) -m pytest -n 2 --dist worksteal -m "not cluster and not gpu"

test: $(VENV)/.dev ## the tests with real Ray, vLLM and DeepSpeed, no GPU needed (about 30 minutes); the pure ones are in make check
	$(PY) -m pytest -m "(cluster or campaign) and not gpu" --durations=15 $$(grep -rlE 'pytest.mark.(cluster|campaign)' tests --include='test_*.py')

prove: $(VENV)/.dev ## the tests that take a minute each: random schedules, faults at every point, methods, whole runs on vLLM
	PACELINE_PROVE=1 $(PY) -m pytest -s $$(grep -rlE '^from (tests.prove|hypothesis) import' tests --include='test_*.py')

chaos: $(VENV)/.dev ## 1,000 faults into real runs, 10,000 bad inputs (hours; goes on where it was stopped)
	$(PY) -m tests.chaos.bad_inputs --inputs 10000
	$(PY) -m tests.chaos --faults 1000 --vllm 40 --state runs/chaos/state.jsonl --work runs/chaos

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
