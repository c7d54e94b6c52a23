# make demo   compile the built-in model for this CPU, run it on a picture, say where the report is
# make test   the tests, in some minutes; make test-slow adds those that take longer
# make check  lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-slow check

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/edgevlm compile demo --target cpu --search-minutes 1 --output $(OUT)/bundle --overwrite
	test -d $(OUT)/pictures || $(BIN)/python -m edgevlm.data.write_shapes $(OUT)/pictures -n 20 --seed 2 --layout csv
	$(BIN)/edgevlm run $(OUT)/bundle $(OUT)/pictures/images/000000.png
	@echo "report: $(OUT)/bundle/report/report.html"

test: install
	$(BIN)/python -m pytest -m 'not slow' --durations 10

test-slow: install
	$(BIN)/python -m pytest -m slow --durations 10

check: install
	$(BIN)/ruff check edgevlm tests benchmarks
	$(BIN)/ruff format --check edgevlm tests benchmarks
	$(BIN)/mypy edgevlm
	# What a device runs must do with Python 3.10; making bundles need not.
	$(BIN)/mypy --python-version 3.10 --follow-imports silent --disable-error-code import-not-found \
	  edgevlm/runtime edgevlm/measure edgevlm/cli edgevlm/devices edgevlm/data_files.py edgevlm/tuning.py
