# Needs python (3.11 or newer), git and make. `make help` lists what there is.
.DEFAULT_GOAL := help
.PHONY: help demo test slow soak docs readme bench quality lint check hooks install clean

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14 python
OUT ?= runs/demo
export DATA OUT

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## train on built-in sounds (or DATA=folder), evaluate on held-out ones, write OUT=runs/demo
	@$(VENV)/bin/audiomaepp demo --out "$$OUT" $(if $(DATA),--data "$$DATA")

test: $(STAMP) ## every quick notebook cell and tests/ (ARGS="-k losses" goes to pytest)
	@$(PY) -m pytest $(ARGS)

slow: $(STAMP) ## the slow cells and tests, with the cells they stand on
	@$(PY) -m pytest --slow -m slow $(ARGS)

soak: $(STAMP) ## kill, fill disks, take data away, mutate files; a table of what survived (ARGS=--quick for a minute)
	@$(PY) tests/soak.py $(ARGS)

docs: $(STAMP) ## the site, from the notebooks, in _site/ (no Quarto needed)
	@$(PY) docs/build.py site

readme: $(STAMP) ## README.md from nbs/index.ipynb
	@$(PY) docs/build.py readme

bench: $(STAMP) ## speed beside peers and the machine's limit (ARGS="--out runs/speed"; --quick for a few minutes)
	@$(PY) benchmarks/speed.py $(ARGS)

quality: $(STAMP) ## held-out quality of the presets, fold by fold (ARGS="--data folder …"); up to an hour
	@$(PY) benchmarks/quality.py $(ARGS)

lint: $(STAMP) ## ruff on notebooks, package and tests
	@$(PY) -m ruff check .

check: lint ## exports, outputs and README in sync with the notebooks; notebooks small; cells short, examples in sight
	@now() { git status --porcelain; git diff --no-ext-diff | git hash-object --stdin; }; before="$$(now)"; \
	$(VENV)/bin/nbdev-export && $(VENV)/bin/nbdev-clean && $(PY) docs/build.py readme || exit 1; \
	[ "$$before" = "$$(now)" ] || { echo "Out of sync: exporting, cleaning or the README changed something."; \
	echo "Changed files before (with a sum of the changes):"; echo "$$before"; echo "and after:"; now; exit 1; }
	@big="$$(find nbs -name '*.ipynb' -size +250000c)"; [ -z "$$big" ] || { echo "Over 250 kB: $$big"; exit 1; }
	@$(PY) tests/check_chapters.py
	@echo "Modules, notebooks and README are in sync."

hooks: $(STAMP) ## once per clone: notebooks cleaned on save, merged and diffed as notebooks
	@$(VENV)/bin/nbdev-install-hooks

install: $(STAMP) ## .venv with everything, at the versions of constraints.txt
	@:

# .installing stays behind when an installation is killed: the next one then starts from an empty .venv.
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@if [ -e $(VENV)/.installing ] || ! $(PY) -c "" >/dev/null 2>&1; then \
		for py in $(PYTHON); do \
			"$$py" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; py=; \
		done; \
		[ -n "$$py" ] || { echo "No Python 3.11 or newer (with venv) among: $(PYTHON)."; \
			echo "Install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }; \
		echo "Making $(VENV) with $$("$$py" --version) and installing (a few minutes, once)."; \
		rm -rf $(VENV); "$$py" -m venv $(VENV); \
	else echo "Bringing $(VENV) up to date."; fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@touch $(VENV)/.installing
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e ".[dev]"
	@mv $(VENV)/.installing $(STAMP) && touch $(STAMP)

clean: ## remove what was built (not .venv, not runs/)
	rm -rf _proc _docs _site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find audiomaepp nbs tests docs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
