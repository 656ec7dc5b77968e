# Every target makes .venv first if it has to; `make` alone lists them.
# PYTHON=/path/to/python3 chooses the interpreter (3.12 or newer); without it scripts/find_python does.

.DEFAULT_GOAL := help
.PHONY: help demo test aot lint format constraints clean

PY := .venv/bin/python
PY_AOT := .venv-aot/bin/python
PARALLEL := -n 2 --dist worksteal
# pyright would ask the package index for a newer self at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 22

demo: .venv/ready  ## Answer a handful of prompts with the demo model
	@$(PY) examples/demo.py

test: lint  ## Lint, then run all tests (with ARGS="-k name" for pytest: those of the CPU that it selects)
	@$(PY) -m pytest $(or $(ARGS),$(PARALLEL))
	@$(if $(ARGS),,$(MAKE) --no-print-directory aot)

aot: .venv-aot/ready  ## Compile the kernels for GPUs that are not here, and check their machine code (ARGS too)
	@$(PY_AOT) -m pytest tests/aot $(or $(ARGS),$(PARALLEL))

lint: .venv/ready  ## ruff (rules and format) and pyright
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	@$(PY) -m pyright

format: .venv/ready  ## Let ruff fix and format what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

constraints: .venv-aot/ready  ## Write the versions of both environments to constraints.txt
	@{ echo "# The versions jpaged is tested with; written by make constraints."; \
	   $(PY_AOT) -m pip freeze --exclude-editable --exclude jpaged; } > constraints.tmp
	@mv constraints.tmp constraints.txt && touch .venv/ready

clean:  ## Remove .venv, caches and build outputs
	rm -rf .venv .venv-aot build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/ready names the folder that .venv was made for: a moved or copied tree sets up again.
ifneq "$(shell cat .venv/ready 2>/dev/null)" "$(CURDIR)"
.PHONY: .venv/ready
endif

# An interrupted set-up leaves .venv/incomplete behind, and the next call starts it anew.
.venv/ready: pyproject.toml constraints.txt
	@if [ -e .venv/incomplete ] || ! $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	   python=$$(scripts/find_python) || exit 1; \
	   echo "Making .venv with $$python"; \
	   rm -rf .venv && mkdir .venv && touch .venv/incomplete && "$$python" -m venv .venv || exit 1; \
	 fi
	@touch .venv/incomplete
	@echo "Installing jpaged and what it needs into .venv (about 1 GB, once)"
	@$(PY) -m pip install -qq --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@rm .venv/incomplete && echo "$(CURDIR)" > $@

# The CUDA plugin lives apart, on top of .venv: in it, it would look for a card, in vain and aloud, wherever JAX starts.
.venv-aot/ready: PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-aot/ready: .venv/ready
	@echo "Installing the CUDA compiler into .venv-aot (about 0.6 GB, once)"
	@rm -rf .venv-aot && $(PY) -m venv .venv-aot
	@echo "import site; site.addsitedir('$$($(PY) $(PACKAGES))')" > "$$($(PY_AOT) $(PACKAGES))/venv.pth"
	@$(PY_AOT) -m pip install -qq --disable-pip-version-check -e ".[aot]" -c constraints.txt
	@touch $@
