# Everything from a bare clone: make demo, make test. A second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Test files at the same time; many of them start processes of their own.
JOBS ?= 2
SEEDS ?= 1 2 3 4 5 6 7 8

.PHONY: demo test test-all chaos fuzz mutants lint format clean

demo: $(VENV)/.demo
	$(BIN)/mae-dist demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

# Hours of a bad cluster in minutes: a run under fire for each of SEEDS; also ENGINE=deepspeed ZERO=2, or ELASTIC=1:
# another number of processes in each attempt.
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.cluster.chaos --seeds $(SEEDS) $(if $(ENGINE),--engine $(ENGINE)) $(if $(ZERO),--zero $(ZERO)) \
		$(if $(ELASTIC),--elastic)

# Inputs made wrong at random: COUNT of each kind, from seed FIRST on.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --first $(or $(FIRST),0) --count $(or $(COUNT),1000)

# Would the tests notice? One line of the product made wrong at a time, and the tests of `make test` that must fail.
mutants: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutants

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[deepspeed]' --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) demo
