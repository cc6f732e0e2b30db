# Each target sets up what it needs, from nothing but Python and make.

PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
EXAMPLES_VENV ?= .venv-examples
WORKERS ?= auto
PYTEST_ARGS ?=
MNIST1D_ARGS ?=

INSTALL = -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt
REQUIREMENTS = pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo mnist1d test lint format types docs wheel check-wheel clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.demo ## Run the demo, NumPy beside PyTorch and JAX, in an environment of its own.
	$(DEMO_VENV)/bin/python -m implicit_core demo

mnist1d: $(EXAMPLES_VENV)/.examples ## Train on MNIST-1D. More options: MNIST1D_ARGS="--gradient neumann".
	$(EXAMPLES_VENV)/bin/python -m implicit_core.examples.torch_mnist1d $(MNIST1D_ARGS)

test: $(VENV)/.test ## Run the tests. More options: PYTEST_ARGS="-k anderson", WORKERS=4.
	$(VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Check style and formatting with ruff.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev ## Let ruff fix what it can.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# A checker started in the checkout doesn't see that backends/ is implicit_core.backends: check an installed copy.
types: $(VENV)/.dev ## Check types with mypy, on an installed copy.
	rm -rf build
	$(VENV)/bin/python $(INSTALL) --no-deps --target build/types .
	cd build && MYPYPATH=types $(abspath $(VENV))/bin/python -m mypy \
		--config-file ../pyproject.toml --cache-dir ../.mypy_cache --package implicit_core

# From nothing each time: a page that was not built anew would not have run either.
docs: $(VENV)/.docs ## Build the documentation into build/docs, and run its pages. Warnings are errors.
	rm -rf build/docs
	$(VENV)/bin/python -m sphinx --builder html --jobs auto --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Open build/docs/index.html, or serve it: $(VENV)/bin/python -m http.server --directory build/docs"

wheel: $(VENV)/.dev ## Build the sdist, and the wheel from it, into dist/.
	rm -rf dist
	$(VENV)/bin/python -m build --quiet --dependency-constraints-txt constraints.txt

check-wheel: wheel ## Install the wheel into an empty environment and use it there.
	$(VENV)/bin/python .ci/check_wheel.py

clean: ## Remove the environments and all that was built.
	rm -rf $(VENV) $(DEMO_VENV) $(EXAMPLES_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. Stamps say what is installed; they are renewed when the requirements change.

$(VENV)/.pip $(DEMO_VENV)/.pip $(EXAMPLES_VENV)/.pip: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	@touch $@

$(VENV)/.test: $(VENV)/.pip $(REQUIREMENTS)
	$(VENV)/bin/python $(INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(VENV)/bin/python $(INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(VENV)/bin/python $(INSTALL) --editable ".[docs]"
	@touch $@

$(DEMO_VENV)/.demo: $(DEMO_VENV)/.pip $(REQUIREMENTS)
	$(DEMO_VENV)/bin/python $(INSTALL) --editable ".[jax-demo,torch]"
	@touch $@

$(EXAMPLES_VENV)/.examples: $(EXAMPLES_VENV)/.pip $(REQUIREMENTS)
	$(EXAMPLES_VENV)/bin/python $(INSTALL) --editable ".[examples]"
	@touch $@
