# make book   an environment, the real model, a first run, the built book
# make test   everything that CI checks
#
# Variables:
#   PYTHON   a Python of 3.10 or newer     (default: the first one found)
#   VENV     where the environment lies    (default: .venv)
#   TORCH    what pip installs first       (default: torch==2.13.0)
# TORCH takes any of pip's options too, such as an index of CPU builds.

VENV ?= .venv
TORCH ?= torch==2.13.0
CANDIDATES = python3 python3.14 python3.13 python3.12 python3.11 python3.10 \
	python
NEW_ENOUGH = -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))'
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)

PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
PIP = $(PY) -m pip --disable-pip-version-check install --quiet
PYTEST = $(PY) -m pytest --quiet --durations=10
NOTES = _build/not_checked.txt

.NOTPARALLEL:
.PHONY: help book test fresh env model quickstart html notebooks pins clean
.PHONY: check-notebooks check-library check-outputs check-site

help:
	@sed -n '/^# make/,/^$$/p' Makefile | sed 's/^# \{0,1\}//'

book: env model quickstart html

env: $(STAMP)

# torch first and alone: resolving it together with the rest can bring
# another, much larger build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "specref needs Python 3.10 or newer with its venv module;" \
		"none was found. Name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 \
		|| { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "$(PYTHON) has no working venv module: install it" \
		"(on Debian and Ubuntu: the package python3-venv)"; exit 1; }
	@echo "installing $(firstword $(TORCH))"
	@$(PIP) $(TORCH)
	@echo "installing the pinned versions of constraints.txt"
	@$(PIP) -c constraints.txt -e '.[models,book,test]'
	@touch $(STAMP)

model: env
	$(PY) -m specref models --fetch

quickstart: env
	$(PY) tools/quickstart.py

html: env
	$(PY) tools/build.py

test: fresh check-notebooks check-library check-outputs html check-site
	@echo "all checks passed"
	@if [ -s $(NOTES) ]; then sort -u $(NOTES); fi

# Checks write what they had to skip into NOTES; it is repeated at the end.
fresh:
	@rm -f $(NOTES)

# Are the notebooks those of their sources, complete and clean?
check-notebooks: env
	$(PY) tools/nb.py check

# The library, the project and the checks themselves.
check-library: env
	$(PYTEST) tests

# Every stored output once more.
check-outputs: env
	$(PYTEST) --nbval book

# The built pages: formulas, offline, in a browser.
check-site: env
	$(PY) tools/check_math.py
	$(PY) tools/check_offline.py
	$(PY) tools/check_pages.py

# For authors.
notebooks: env
	$(PY) tools/nb.py run --stale

pins: env
	$(PY) tools/pin.py > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf _build
