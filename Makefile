# lmtrain: `make help` lists the targets. Everything happens in .venv; nothing outside the repository is touched.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ARGS ?=

ENVIRONMENT := $(VENV)/.environment
PACKAGES := $(VENV)/.packages
LIBRARY := $(VENV)/.library
MODULES := $(VENV)/.modules
CSRC := $(shell find csrc -type f)

.PHONY: FORCE help install demo test test-distributed test-all lint bench bench-ops bench-data bench-recall abi-check parity-fla fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(LIBRARY) ## make .venv, install through constraints.txt, build csrc; does nothing if nothing changed

$(ENVIRONMENT):
	@command -v $(PYTHON) >/dev/null || { echo "lmtrain needs Python 3.11 or newer and found no $(PYTHON): install it, or say \`make PYTHON=/path/to/python3.11 install\`"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lmtrain needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V): say \`make PYTHON=/path/to/python3.11 install\`"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: \`apt-get install python3-venv\`)"; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || { echo "lmtrain needs a C++ compiler and found none: install one (Debian, Ubuntu: \`apt-get install g++\`; macOS: \`xcode-select --install\`)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# the build tools and torch come first: csrc is compiled against the torch that is installed
$(PACKAGES): pyproject.toml constraints.txt | $(ENVIRONMENT)
	@echo "installing the packages of pyproject.toml through constraints.txt (about 2 GB, minutes the first time)"
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p["build-system"]["requires"], "cmake", "ninja", *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	@$(PIP) install --no-compile -c constraints.txt -r $(VENV)/requirements.txt && touch $@ && echo "packages: $$SECONDS s"

# an editable install keeps a table of modules: it must be made anew when files come or go
$(MODULES): FORCE | $(ENVIRONMENT)
	@find lmtrain launch eval recipes -name '*.py' -o -name '*.yaml' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

FORCE:

$(LIBRARY): $(PACKAGES) $(CSRC) $(MODULES)
	@echo "building csrc"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-deps --no-build-isolation -e . && touch $@ && echo "csrc: $$SECONDS s"

demo: install ## train, resume, evaluate and export a small hybrid on this machine
	@$(BIN)/python launch/demo.py $(ARGS)

test: install ## the tests of every day
	@$(TEST) -m "not slow and not distributed" $(ARGS)

test-distributed: install ## the tests that spawn several ranks on this machine
	@$(TEST) -m "distributed and not slow" tests/distributed $(ARGS)

test-all: install ## every test
	@$(TEST) $(ARGS)

lint: install ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: bench-ops ## bench-ops, and whole training steps against transformers
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/train_cpu.py

bench-ops: install ## every op against plain torch and transformers, about six minutes; writes benchmarks/results/ops.json
	@$(BIN)/python benchmarks/ops.py $(ARGS)

bench-data: install ## order, loading, opening and ingest against numpy and datasets, four minutes; writes benchmarks/results/data.json
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/data.py $(ARGS)

bench-recall: install ## MQAR and parity learned by every mixer, under 20 minutes on two cores; writes benchmarks/results/recall.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recall.py $(ARGS)

abi-check: install ## the library under torch 2.11 and the newest (downloads 5 GB, CUDA wheels included; keeps 9 GB in build/abi)
	@$(BIN)/python tests/ops/abi_check.py $(or $(ARGS),"2.11.*" newest)

parity-fla: install ## ops and mixers against flash-linear-attention (an environment of its own, keeps 2 GB in build/fla)
	@$(BIN)/python tests/peers/parity_fla.py

fuzz: install ## the library's ops on random arguments under AddressSanitizer (a build of its own, minutes)
	@$(BIN)/python tests/ops/fuzz_bindings.py $(ARGS)

clean: ## remove what builds and tests left behind (the environment stays; `rm -rf .venv` removes it)
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis $(LIBRARY)
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
