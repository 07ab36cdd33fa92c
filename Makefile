# From a fresh clone: `make demo`, then `make test`. Needs Python 3.11 to 3.13 with venv, and on Linux g++.
# It has to work with make 3.81, which macOS ships.

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Candidates: the first that works is used.
PYTHON ?= python3.13 python3.12 python3.11 python3
# Exit codes: 0 works, 3 wrong version, 4 an Intel Python on a Mac, 1 no venv.
PROBE := import platform, sys; \
  sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)) or sys.exit(3); \
  platform.system() == "Darwin" and platform.machine() != "arm64" and sys.exit(4); \
  import ensurepip, venv

.PHONY: help demo test test-slow lint clean

help:
	@echo "make demo       convert the demo model to 4 bit and ask it a sum"
	@echo "make test       run the tests, a few minutes (make test-slow: the longer ones)"
	@echo "make lint       run ruff and mypy"
	@echo "make clean      remove the environment and everything built"

demo: $(VENV)/.installed
	$(BIN)/magistral convert --hf-path magistral_mlx/demo --mlx-path build/demo-4bit --q-method round --no-tokenizer-json --force
	$(BIN)/magistral generate --model build/demo-4bit --prompt "What is 48 + 76?" </dev/null

# pytest starts a worker for each core; more threads would wait for each other.
test: $(VENV)/.installed-test
	OPENBLAS_NUM_THREADS=1 $(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow --durations 30

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "installing (a minute or two on the first run)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the tests' requirements"
	@$(PIP) install --editable ".[test]"
	@touch $@

# On Linux MLX compiles its CPU kernels with g++ when they are first used.
$(VENV)/.created:
	@if [ "`uname`" = Linux ] && ! command -v g++ >/dev/null 2>&1; then \
	  echo "MLX needs g++ on Linux, and it is missing. On Debian and Ubuntu: sudo apt install g++" >&2; exit 1; \
	fi
	@if [ "`uname`" = Darwin ]; then \
	  macos=`sw_vers -productVersion`; \
	  if [ "$${macos%%.*}" -lt 14 ]; then echo "This is macOS $$macos; MLX needs macOS 14 or later." >&2; exit 1; fi; \
	fi
	@for python in $(PYTHON); do \
	  command -v $$python >/dev/null 2>&1 || continue; \
	  $$python -c '$(PROBE)' >/dev/null 2>&1; \
	  case $$? in \
	    0) echo "using $$python (`$$python --version 2>&1`)"; \
	       $$python -m venv --clear $(VENV) && touch $@; exit $$?;; \
	    3) found="$$found $$python is `$$python --version 2>&1`.";; \
	    4) found="$$found $$python is an Intel program and cannot run MLX."; \
	       found="$$found Install an arm64 Python, from a terminal that does not use Rosetta.";; \
	    1) found="$$found $$python has no venv module (on Debian and Ubuntu: sudo apt install python3-venv).";; \
	  esac; \
	done; \
	echo "Found no Python 3.11, 3.12 or 3.13 that can run MLX.$$found" >&2; \
	echo "On a Mac: brew install python@3.13, or use the installer from python.org." >&2; \
	echo "On Debian and Ubuntu: sudo apt install python3 python3-venv. Or name yours: make demo PYTHON=/path/to/python3.13" >&2; \
	exit 1
