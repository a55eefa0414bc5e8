# Needs Python 3.10 or later and make; everything else is installed into .venv.
PYTHON ?= python3

TORCH := torch==2.13.0
INSTALLED := .venv/installed

# Run a second time, through Triton's interpreter: only there do the kernels' own bodies run on a CPU.
KERNEL_TESTS := tests/unit/kernels $(wildcard $(patsubst kernels/%.py,tests/property/test_%.py,$(wildcard kernels/*.py)))

.PHONY: demo test test-all slow lint clean

demo: $(INSTALLED)
	.venv/bin/l2c demo --out out/demo --force

# One thread a worker: two workers that each take every core are slower than one. A worker gets tests that stand together,
# so that it captures and compiles what they share once, and takes from the other one when it is done.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

test: lint
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(KERNEL_TESTS)

# The rest: each says in its marker why it takes long.
slow: $(INSTALLED)
	$(PYTEST) -m slow

test-all: test slow

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	! grep -rn make_block_ptr --include='*.py' l2c_compile kernels passes bench

# torch is named next to the constraints: with both, pip can neither take a newer one nor keep an older one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
