# Every target works on a fresh clone; `make help` says what each does.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
STATE ?= $(HOME)/.local/state/finetune-operator/cluster
export PYTHON
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
# uv installs no bytecode: unless Python writes it, each process compiles torch and transformers anew (12 s).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo example test test-trainer-all chaos e2e e2e-slow e2e-ready lint verify audit cluster-up cluster-down image bench bench-operator lock clean .venv

help: ## What the targets do
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)$$/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.venv: ## (made by the targets that need it)
	@hack/venv

demo: .venv ## Fine-tune a real model on this machine, without a cluster
	@$(BIN)/python hack/demo.py

example: .venv ## One of examples/*.yaml on this machine, without a cluster: make example NAME=question-answering
	@$(BIN)/python hack/example.py $(NAME)

test: .venv ## All tests that need no cluster
	@$(BIN)/pytest tests --ignore=tests/e2e --ignore=tests/chart -m "not chaos" -n $(WORKERS) --dist worksteal --durations=10

test-trainer-all: .venv ## Every task with every method, on one process and on two; writes docs/matrix.md
	@$(BIN)/python -m tests.matrix

chaos: .venv ## Kill 200 runs at random and one at each step while storage misbehaves; writes docs/reliability.md. Damage each stored object in turn
	@$(BIN)/python -m tests.chaos
	@hack/timed "damage" $(BIN)/pytest -m chaos tests/chaos/test_damage.py

# Without pytest's logging, which walks over all loggers while tests in other threads make new ones.
e2e: e2e-ready ## The tests on a real cluster: brings it up, builds the images, runs tests/e2e and tests/chart; 20 runs of make chaos
	@PATH="$$PATH:$$(dirname "$$(hack/kubectl)")" KUBECONFIG=$(STATE)/kubeconfig \
	  hack/timed "tests/e2e" $(BIN)/pytest -p no:logging tests/e2e tests/chart -m "not slow" --durations=20
	@hack/timed "20 runs of make chaos" $(BIN)/pytest -m chaos tests/chaos/test_chaos.py tests/storage

e2e-slow: e2e-ready ## Those of them that take minutes: an upgrade over 22 jobs, runs killed three times or in one pod of two, a base of 4 GB, Kueue
	@hack/timed "Kueue" hack/kueue
	@PATH="$$PATH:$$(dirname "$$(hack/kubectl)")" KUBECONFIG=$(STATE)/kubeconfig \
	  hack/timed "tests/e2e, slow" $(BIN)/pytest -p no:logging tests/e2e -m slow --durations=20

e2e-ready: .venv
	@hack/timed "cluster" hack/cluster/up
	@hack/timed "binaries of tests/e2e" hack/cluster/build etcd kube-apiserver kube-controller-manager
	@hack/timed "program of tests/e2e/test_gitops.py" hack/health/build
	@hack/timed "S3 server" hack/cluster/seaweedfs up
	@hack/timed "images" hack/images/build

lint: .venv ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

verify: .venv ## Fail when a generated file (CRDs, chart copies, docs, locks) is not fresh
	@$(BIN)/python hack/verify.py

audit: .venv ## Known vulnerabilities of the locked packages, from osv.dev or a mirror of it (OSV_URL)
	@hack/audit

cluster-up: .venv ## A real single-node Kubernetes and an S3 server on this machine (root), or kind where Docker runs
	@hack/cluster/up
	@hack/cluster/seaweedfs up

cluster-down: ## Take both down; the images stay in the cache (hack/cluster/down --purge removes them)
	@hack/cluster/down

image: ## Build the three images and put them into the cluster when it is up
	@hack/images/build

bench: .venv ## Measure against the peers (bench/)
	@$(BIN)/python -m bench

bench-operator: .venv ## Measure the operator beside plain Jobs and a peer, as root (bench/operator); half an hour
	@$(BIN)/python -m bench.operator $(JOBS)

lock: .venv ## Write requirements/*.lock again from pyproject.toml (UPGRADE=1 takes the newest versions)
	@hack/lock

clean: ## Remove what was made in the checkout; caches and cluster stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find . -name __pycache__ -prune -exec rm -r {} +
