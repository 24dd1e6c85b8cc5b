# make setup | demo | test: each installs what is missing first. `make help` lists all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= outputs/demo
DEMO_POLICIES := expert vlahub/lingbot-tiny-clickbell random
EPISODES ?= 16
# The expert needs 80 control steps. A random policy that may flail for the environment's 400 hits the bell by chance more often than not.
MAX_STEPS ?= 120
# The address of a package index with CPU builds of torch (the PyTorch install page names one). Empty: what pip finds by itself.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options: PYTHON=python3.12 (the interpreter of a new .venv), TORCH_INDEX=ADDRESS (a package index with CPU builds of torch)"

setup: system $(STAMP) ## Install everything into .venv; as root also the system packages for software rendering

.PHONY: system
system:
	@bash tools/system_packages.sh
	@if [ "$(origin PYTHON)" = "command line" ] && [ -x $(BIN)/python ]; then \
		wanted=$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])'); there=$$($(BIN)/python -c 'import sys; print(sys.version_info[:2])'); \
		if [ "$$wanted" != "$$there" ]; then echo "$(VENV) holds Python $$there, PYTHON=$(PYTHON) is $$wanted: run 'make clean' first"; exit 1; fi; fi

# hf-libero declares gigabytes that nothing here imports, so it comes without its dependencies; the extra `libero` lists what it does import.
$(STAMP): pyproject.toml constraints.txt tools/no_deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlahub needs Python >= 3.11; this is %s. Say which with make setup PYTHON=python3.12" % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes; the log is $(VENV)/install.log)"
	@{ $(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) $$(grep '^torch==' constraints.txt) &&) \
		$(PIP) install -c constraints.txt -e '.[dev]' && $(PIP) install --no-deps -r tools/no_deps.txt; } > $(VENV)/install.log 2>&1 \
		|| { tail -n 20 $(VENV)/install.log; echo "installing failed; the whole log is $(VENV)/install.log"; exit 1; }
	@touch $(STAMP)
	@echo "installed; activate with: source $(VENV)/bin/activate"

demo: setup ## Evaluate the scripted expert, a small trained VLA and a random policy on RoboTwin-ClickBell, then improve another by GRPO (ten minutes in all); everything in outputs/demo
	@for policy in $(DEMO_POLICIES); do \
		$(BIN)/vlahub eval --env vlahub/RoboTwin-ClickBell --policy $$policy --episodes $(EPISODES) --max-steps $(MAX_STEPS) --num-envs 2 --seed 0 --videos 1 \
			--out $(OUT)/$$(basename $$policy) || exit 1; done
	@for policy in $(DEMO_POLICIES); do echo "report of $$policy: $(abspath $(OUT))/$$(basename $$policy)/report.html"; done
	@$(BIN)/python examples/improve_policy.py --out $(OUT)/improve

test: setup ## Run the whole test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests  # whole files: what a module's tests share, a world or a run, is made once

lint: setup ## Check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## Remove .venv, caches and outputs
	rm -rf $(VENV) build dist outputs *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
