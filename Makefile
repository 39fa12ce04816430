# The two that matter: `make serve` (the main job) and `make test`. Both set up all that they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CLIENTS := .venv-clients

DATA := languages
CHECKPOINT := runs/$(DATA)
BUNDLE := bundles/$(DATA)/1
# The default model is exact, with the kernels that serve it fastest. The Dockerfile has the same flags.
TRAIN := evalmode train --data $(DATA) --arithmetic exact --weight-bits 7
EXPORT := evalmode export --kernels integer
ENGINE ?= $(shell command -v docker || command -v podman)
IMAGE ?= evalmode

.PHONY: serve test check minimum zoo lint bench image clean

serve: $(BUNDLE)/manifest.json  ## train, export and certify the default model once, then serve it on :8000
	$(BIN)/evalmode serve $(BUNDLE)

test: $(VENV)/dev $(CLIENTS)/ready  ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: lint test  ## what a change must pass

minimum: $(CLIENTS)/ready  ## the whole suite with the lowest versions that pyproject.toml declares
	$(PYTHON) -m venv --clear build/minimum
	build/minimum/bin/python -m pip --disable-pip-version-check install -q uv
	build/minimum/bin/uv pip install -q --python build/minimum/bin/python --resolution lowest-direct -e '.[cpu,train,export,dev]'
	build/minimum/bin/python -m pytest -W default -n auto --maxprocesses 4 --dist loadfile

zoo: $(VENV)/dev  ## every architecture of docs/zoo.md, exported and confirmed, and a table of the verdicts
	$(BIN)/python -m pytest tests/zoo -m '' -n 2

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BUNDLE)/manifest.json $(VENV)/dev  ## start-up, memory and latency of the server, as figures
	$(BIN)/python bench/speed.py $(BUNDLE)

image: $(BUNDLE)/manifest.json  ## a container image that serves the default bundle
	$(ENGINE) build --build-context bundle=bundles/$(DATA) -t $(IMAGE) .

clean:  ## the environments and the default model; your own runs and bundles stay
	rm -rf $(VENV) $(CLIENTS) $(CHECKPOINT) bundles/$(DATA) build dist *.egg-info

$(BUNDLE)/manifest.json: | $(CHECKPOINT)/checkpoint.json
	$(BIN)/$(EXPORT) $(CHECKPOINT)

$(CHECKPOINT)/checkpoint.json: | $(VENV)/serve
	$(BIN)/$(TRAIN) --out $(CHECKPOINT) --resume

# A stamp for each set of extras: pip runs again only when what it would read has changed.
$(VENV)/serve: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[cpu,train,export]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[cpu,train,export,dev]'
	@touch $@ $(VENV)/serve

# The protocol's clients, real and unmodified: what they pin (protobuf, pandas, ml_dtypes) clashes with what we do.
$(CLIENTS)/ready: constraints-clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install -q -c constraints-clients.txt kserve 'tritonclient[http]'
	@touch $@
