PYTHON ?= python3
BIN = .venv/bin

# Of transformers, besides the pinned one: OpenUnlearning's, its upstream's and the newest.
MATRIX = 4.45.2 4.51.3 5.24.0

.PHONY: demo test test-matrix lint bench clean

demo: .venv/ready
	$(BIN)/python -m examples.demo

# A process a core, each with one thread: more threads would wait for each other. A file stays in one process,
# so that what its tests share is made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-matrix: $(MATRIX:%=.venv-transformers-%/ready)
	@for version in $(MATRIX); do \
		echo "transformers $$version"; \
		.venv-transformers-$$version/bin/python -m pytest -q -W default tests/integrations/test_transformers*.py || exit 1; \
	done

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks cpu
	$(BIN)/python -m benchmarks speed
	$(BIN)/python -m benchmarks host
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks shards
	$(BIN)/python -m benchmarks compile

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv-transformers-%/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	grep -vE '^(transformers|tokenizers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt \
		--editable '.[transformers,triton]' transformers==$* torch==2.13.0 numpy pytest hypothesis
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info
