PYTHON ?= python3
BIN = .venv/bin

# Of transformers, besides the pinned one: OpenUnlearning's, its upstream's and the newest.
MATRIX = 4.45.2 4.51.3 5.24.0
DEEPSPEED = 0.19.8
ECOSYSTEM = bitsandbytes==0.50.2 torchao==0.18.0 trl==1.16.0 datasets==5.2.0

.PHONY: demo experiment docs test test-matrix test-deepspeed test-ecosystem lint bench clean

demo: .venv/ready
	$(BIN)/python -m examples.demo

# An experiment that was interrupted continues where it stopped.
experiment: .venv/ready
	$(BIN)/python -m examples.experiment

# A process a core, each with one thread: more threads would wait for each other. A file stays in one process,
# so that what its tests share is made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-matrix: $(MATRIX:%=.venv-transformers-%/ready)
	@for version in $(MATRIX); do \
		echo "transformers $$version"; \
		.venv-transformers-$$version/bin/python -m pytest -q -W default tests/integrations/test_transformers*.py || exit 1; \
	done

# The tests that `make test` skips because DeepSpeed is not in its environment.
test-deepspeed: .venv-deepspeed/ready
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-deepspeed/extensions OMP_NUM_THREADS=1 \
		.venv-deepspeed/bin/python -m pytest -W default -rs \
		tests/distributed/test_deepspeed.py tests/integrations/test_transformers_deepspeed.py

# Optimizers of other libraries and TRL, which `make test` skips because they are not in its environment.
test-ecosystem: .venv-ecosystem/ready
	OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m pytest -W default -rs \
		tests/integrations/test_ecosystem.py tests/integrations/test_peft.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/docs. A browser then opens it, if one is installed, and leaves pictures in build/docs-screenshots.
docs: .venv-docs/ready
	.venv-docs/bin/python -m sphinx -q -W --keep-going -E docs build/docs
	.venv-docs/bin/python -m pytest --noconftest -q -rs tests/test_site.py

bench: .venv/ready
	$(BIN)/python -m benchmarks cpu
	$(BIN)/python -m benchmarks speed
	$(BIN)/python -m benchmarks host
	$(BIN)/python -m benchmarks step
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

.venv-deepspeed/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[transformers,triton,deepspeed]' deepspeed==$(DEEPSPEED) pytest hypothesis
	touch $@

.venv-ecosystem/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[transformers,triton]' pytest hypothesis peft $(ECOSYSTEM)
	touch $@

.venv-docs/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info
