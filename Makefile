# `make demo` and `make test` do all the set-up on a machine with nothing but Python 3.10 to 3.13 and a network to PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.anomalib-pack-installed
DOCS_READY := $(VENV)/.anomalib-pack-docs-installed
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-slow test-gpu lint format docs clean

demo: $(READY)
	$(BIN)/anomalib train --config configs/demo.yaml
	$(BIN)/anomalib report results/Ulsad/SyntheticLoco/tray/latest
	@echo
	@echo "Heat maps: results/Ulsad/SyntheticLoco/tray/latest/images/test/ (folders good, logical_anomalies, structural_anomalies)"
	@echo "Open in a browser: $(CURDIR)/results/Ulsad/SyntheticLoco/tray/latest/report.html"

# Two processes with one thread each: most tests start programs that import for seconds, which threads do not speed up.
# Whole files go to a process, because their tests share costly fixtures. `make test TESTS=tests/records` runs a part.
TEST := -m pytest --numprocesses 2 --dist loadfile $(TESTS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(TEST)

# The same with the lowest versions that pyproject.toml allows, in an environment of their own. TESTS works here, too.
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[test]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(TEST)

# What takes minutes for each test, with time for it.
test-slow: $(READY)
	OMP_NUM_THREADS=1 COMMAND_TIMEOUT=1800 $(BIN)/python $(TEST) -m slow

# What needs a CUDA device, and whatever comes of it, latency, throughput and memory of all models there.
test-gpu: $(READY)
	$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'test-gpu needs a CUDA device; PyTorch finds none.')"
	COMMAND_TIMEOUT=1800 $(BIN)/python -m pytest -m gpu; tests=$$?; \
	$(BIN)/anomalib efficiency --config configs/efficiency/all.yaml && exit $$tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site. A link or reference that leads nowhere is an error.
docs: $(DOCS_READY)
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --conf-dir docs . build/site
	@echo "The site: build/site/index.html"

clean:
	rm -rf $(VENV) $(OLDEST) results build dist

# Anew whenever the requirements change. constraints.txt pins what the tests ran on.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $(DOCS_READY)
