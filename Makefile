# Each target sets up the environment that it needs; only Python and make have to be there.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
DEMO_VENV ?= .venv-demo
EXAMPLES_VENV ?= .venv-examples
WHEEL_VENV ?= .venv-wheel
PACKAGES_VENV ?= .venv-packages
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= $(shell python3.13 -c 'print("python3.13")' 2>/dev/null || echo python3.12)
INSTALLED ?=
WORKERS ?= auto
PYTEST_ARGS ?=
MNIST1D_ARGS ?=

# In the environment that is the folder of the target. Errors are printed, build warnings are not.
PIP = $(@D)/bin/python -m pip -qq
CONSTRAINTS = $(if $(TORCH),build/constraints-torch-$(TORCH).txt,constraints.txt)
INSTALL = @echo "Installing into $(@D)"; $(PIP) install --constraint $(CONSTRAINTS) --build-constraint constraints.txt
REQUIREMENTS = pyproject.toml $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo mnist1d test test-oldest test-newest test-packages lint format types docs wheel check-wheel clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.demo ## Run the demo in NumPy, PyTorch and JAX, in an environment of its own.
	@$(DEMO_VENV)/bin/python -m implicit_core demo

mnist1d: $(EXAMPLES_VENV)/.examples ## Train on MNIST-1D. More options: MNIST1D_ARGS="--gradient neumann".
	$(EXAMPLES_VENV)/bin/python -m implicit_core.examples.torch_mnist1d $(MNIST1D_ARGS)

test: $(if $(INSTALLED),$(WHEEL_VENV)/.wheel,$(VENV)/.test) ## Run the tests; with INSTALLED=1 on the wheel. Options: PYTEST_ARGS="-k anderson", WORKERS=4, TORCH=2.6.0.
	@cd $(if $(INSTALLED),build/suite,.) && $(abspath $(<D))/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# Neither is a part of .ci/run (Decision 113).
test-oldest: $(OLDEST_VENV)/.test ## Run the tests on the oldest versions that pyproject.toml allows, and Python 3.11.
	@$(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-newest: $(NEWEST_VENV)/.test ## Run the tests on the newest versions of all packages, and Python 3.13.
	@$(NEWEST_VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# Without the fixtures of the other tests, which need CuPy and more.
test-packages: $(PACKAGES_VENV)/.packages ## Run the layer beside other packages for PyTorch and JAX, in an environment of its own.
	@$(PACKAGES_VENV)/bin/python -m pytest -n $(WORKERS) --confcutdir tests/packages tests/packages $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Check style and formatting with ruff.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev ## Fix style and formatting with ruff.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.dev ## Check types with mypy.
	$(VENV)/bin/python -m mypy --package implicit_core

# From nothing each time: a page that is not rebuilt is not run either.
docs: $(VENV)/.docs ## Build the documentation into build/docs, and run its pages. Warnings are errors.
	rm -rf build/docs
	$(VENV)/bin/python -m sphinx --builder html --jobs auto --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Open build/docs/index.html, or serve it: $(VENV)/bin/python -m http.server --directory build/docs"

wheel: $(VENV)/.dev ## Build the sdist, and the wheel from it, into dist/.
	rm -rf dist
	$(VENV)/bin/python -m build --quiet --dependency-constraints-txt constraints.txt

check-wheel: wheel ## Install the wheel into an empty environment and use it there.
	$(VENV)/bin/python .ci/check_wheel.py

clean: ## Remove the environments and all build outputs.
	rm -rf $(VENV) $(DEMO_VENV) $(EXAMPLES_VENV) $(WHEEL_VENV) $(PACKAGES_VENV) $(OLDEST_VENV) $(NEWEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With TORCH=2.6.0: the versions of constraints.txt, but this PyTorch, which may ask for another sympy.
build/constraints-torch-%.txt: constraints.txt
	@mkdir -p $(@D)
	@sed -e 's/^torch==.*/torch==$*/' -e '/^sympy==/d' $< > $@

# The lower bounds of pyproject.toml, and the newest versions of what these depend on.
build/constraints-oldest.txt: $(OLDEST_VENV)/.pip pyproject.toml
	@mkdir -p $(@D)
	@$(OLDEST_VENV)/bin/python -m pip -qq install --constraint constraints.txt uv
	@$(OLDEST_VENV)/bin/uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct --extra test \
		--output-file $@ pyproject.toml

# Environments. The stamp files are renewed when the requirements change.

$(VENV)/.pip $(DEMO_VENV)/.pip $(EXAMPLES_VENV)/.pip $(WHEEL_VENV)/.pip $(PACKAGES_VENV)/.pip $(OLDEST_VENV)/.pip $(NEWEST_VENV)/.pip: constraints.txt
	@$(PYTHON) -m venv $(@D)
	@$(PIP) install --upgrade --constraint constraints.txt pip
	@touch $@

$(VENV)/.test: $(VENV)/.pip $(REQUIREMENTS)
	$(INSTALL) --editable ".[test]"
	@touch $@

$(OLDEST_VENV)/.pip: PYTHON = $(OLDEST_PYTHON)
$(NEWEST_VENV)/.pip: PYTHON = $(NEWEST_PYTHON)

$(OLDEST_VENV)/.test: build/constraints-oldest.txt
	@echo "Installing into $(@D)"
	@$(PIP) install --constraint build/constraints-oldest.txt --build-constraint constraints.txt --editable ".[test]"
	@touch $@

# Made each time: there may be newer versions.
.PHONY: $(NEWEST_VENV)/.test
$(NEWEST_VENV)/.test: $(NEWEST_VENV)/.pip
	@echo "Installing into $(@D)"
	@$(PIP) install --upgrade --upgrade-strategy eager --editable ".[test]"

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(INSTALL) --editable ".[docs]"
	@touch $@

$(DEMO_VENV)/.demo: $(DEMO_VENV)/.pip $(REQUIREMENTS)
	$(INSTALL) --editable ".[jax-demo,torch]"
	@touch $@

$(EXAMPLES_VENV)/.examples: $(EXAMPLES_VENV)/.pip $(REQUIREMENTS)
	$(INSTALL) --editable ".[examples]"
	@touch $@

# A dependency brings torchvision, which is imported only if it was built for this build of torch. No test needs it.
$(PACKAGES_VENV)/.packages: $(PACKAGES_VENV)/.pip $(REQUIREMENTS)
	$(INSTALL) --editable ".[packages]"
	@$(PIP) uninstall --yes torchvision
	@touch $@

# Made each time: the wheel of the sources, and a copy of the tests and of what they read, without the package.
.PHONY: $(WHEEL_VENV)/.wheel
$(WHEEL_VENV)/.wheel: $(WHEEL_VENV)/.pip
	@rm -rf build/lib build/wheel build/suite
	@$(PIP) wheel --no-deps --build-constraint constraints.txt --wheel-dir build/wheel .
	$(INSTALL) "$$(echo build/wheel/*.whl)[test]"
	@$(PIP) install --force-reinstall --no-deps build/wheel/*.whl
	@mkdir build/suite
	@cp -R tests benchmarks docs examples *.md LICENSE pyproject.toml build/suite
