PYTHON ?= python3
BIN = .venv/bin

# Of transformers, besides the pinned one: OpenUnlearning's, its upstream's and the newest.
MATRIX = 4.45.2 4.51.3 5.24.0
DEEPSPEED = 0.19.8
KERNELS = 0.17.2
COSMIC_RAY = 8.7.0
ECOSYSTEM = bitsandbytes==0.50.2 torchao==0.18.0 trl==1.16.0 datasets==5.2.0

# The tests that `make dist` runs in the unpacked sdist: rules, kernels, metadata, and tests that read files of
# every folder. `make dist TESTS=tests` runs all of them.
TESTS = tests/test_packaging.py tests/test_architecture.py tests/sago/test_rules.py tests/kernels/test_gram.py \
	tests/benchmarks/test_records.py tests/examples/test_draw.py

# The programs of `make fuzz`: how many, which ones, and in how many processes.
CASES = 10000
SEED = 0
JOBS = 2

# The changes of `make mutation`: how many.
COUNT = 300

# `make test-torch` tests with this version of torch, or with the newest.
TORCH = newest

.PHONY: demo experiment docs test fuzz mutation test-torch test-matrix test-deepspeed test-ecosystem test-hub test-large \
	test-long lint bench dist hub clean

demo: .venv/ready
	$(BIN)/python -m examples.demo

# An experiment that was interrupted continues where it stopped.
experiment: .venv/ready
	$(BIN)/python -m examples.experiment

# A process a core, each with one thread: more threads would wait for each other. A file stays in one process,
# so that what its tests share is made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Random programs on the CPU and in interpreted kernels, which are compared with the reference and the oracle.
# A run that was interrupted continues, and a program that fails is reduced and printed.
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED) --jobs $(JOBS)

# Changes of one place of the library each, which the nearest tests should notice.
mutation: .venv-mutation/ready
	OMP_NUM_THREADS=1 .venv-mutation/bin/python -m tests.mutation --count $(COUNT) --seed $(SEED) --jobs $(JOBS)

test-matrix: $(MATRIX:%=.venv-transformers-%/ready)
	@for version in $(MATRIX); do \
		echo "transformers $$version"; \
		.venv-transformers-$$version/bin/python -m pytest -q -W default tests/integrations/test_transformers*.py || exit 1; \
	done

# All tests with another version of torch. Only the pinned versions have to raise no warnings. CUDA builds of
# torch before 2.8 need an older Triton than the tests, so that these versions need a CPU build.
test-torch: .venv-torch-$(TORCH)/ready
	OMP_NUM_THREADS=1 .venv-torch-$(TORCH)/bin/python -m pytest -n auto --dist loadfile -W default

# The tests that `make test` skips because DeepSpeed is not in its environment.
test-deepspeed: .venv-deepspeed/ready
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-deepspeed/extensions OMP_NUM_THREADS=1 \
		.venv-deepspeed/bin/python -m pytest -W default -rs \
		tests/distributed/test_deepspeed.py tests/integrations/test_transformers_deepspeed.py

# Optimizers of other libraries and TRL, which `make test` skips because they are not in its environment.
test-ecosystem: .venv-ecosystem/ready
	OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m pytest -W default -rs \
		tests/integrations/test_ecosystem.py tests/integrations/test_peft.py

# More than 2^31 elements in one tensor and in one bucket, with up to 16 GiB of memory.
test-large: .venv/ready
	$(BIN)/python -m pytest -m large tests/test_large.py

# 10,000 windows in each way in, and ranks that fail on two and four ranks.
test-long: .venv/ready
	$(BIN)/python -m pytest -s -m long tests/test_long.py tests/distributed/test_failures.py

# The kernels in the layout of the Hugging Face hub, loaded with its package `kernels`.
test-hub: .venv-hub/ready
	OMP_NUM_THREADS=1 .venv-hub/bin/python -m pytest -W default -rs tests/test_hub.py

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

# Builds the sdist, and the wheel from it, and installs each into an environment of its own. The sdist would
# otherwise also have the files of an earlier list in *.egg-info.
dist: .venv-dist/ready
	rm -rf dist *.egg-info
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python tools/check_dist.py $(TESTS)

# Needs no package besides Python.
hub:
	$(PYTHON) tools/hub.py build/hub

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

.venv-torch-%/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	grep -vE '^(torch|triton)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt \
		$(if $(filter newest,$*),torch,torch==$*) --editable '.[test]'
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

.venv-hub/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[triton]' kernels==$(KERNELS) numpy pytest hypothesis
	touch $@

.venv-dist/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip build twine 'readme_renderer[md]'
	touch $@

.venv-mutation/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' cosmic-ray==$(COSMIC_RAY)
	touch $@

.venv-docs/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
