# Two commands do everything: `make run` (install, serve) and `make test` (install, check, test).
PYTHON ?= python3
PORT   ?= 7860
TESTS  ?= 0
BIN    := .venv/bin

.PHONY: run test check bench demo-model format clean

run: .venv/.installed-run
	@$(BIN)/quantarena serve --port $(PORT)

# One after the other; TESTS=2 shares the files among two processes: faster, but hard on browser tests.
test: .venv/.installed-test .venv/.chromium check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS) --dist loadfile

check: .venv/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.installed-test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.installed-run
	@$(BIN)/quantarena bench

demo-model: .venv/.installed-run
	@$(BIN)/python -m backend.demo.corpus
	@$(BIN)/python -m backend.demo.train

# A stamp per set of extras: `make test` after `make run` installs only what is missing.
.venv/.installed-run: pyproject.toml constraints.txt .ci/install
	@.ci/install "$(PYTHON)" "."
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt .ci/install
	@.ci/install "$(PYTHON)" ".[test]"
	@touch $@ .venv/.installed-run

# Debian's chromium for the browser tests, where root and apt are there; else those tests skip.
.venv/.chromium: .venv/.installed-test
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    echo "Installing Debian's chromium for the browser tests"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null || \
	    echo "chromium could not be installed; the browser tests will be skipped"; \
	fi
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
