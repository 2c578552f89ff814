# `make bench` and `make test` need Python 3.10 or newer and nothing else; each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VENV36 := $(VENV)/triton36
VENV4 := $(VENV)/transformers4

.PHONY: bench bench-check readme test test-slow test-transformers4 lint aot sanitize gpu clean

# torch first and by its exact version: pip then takes a CPU wheel that lies on the machine, where there is one, and
# nothing that follows asks for another build. timm is an oracle of the tests, one file of it, which needs nothing else.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps timm
	touch $(STAMP)

bench: $(STAMP)
	$(BIN)/albert-fast bench $(ARGS)

# The README's tables and figures, from benchmarks/results; ARGS=--check only compares.
readme: $(STAMP)
	$(BIN)/python -m albert_fast.bench.readme $(ARGS)

# Ratios to PyTorch's reference beside the committed ones; ARGS=--write writes those of this kind of machine.
bench-check: $(STAMP)
	$(BIN)/python -m albert_fast.bench.check $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n 2 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel on every architecture, compiled without a GPU: CUDA C++ by nvcc, Triton's by both versions of Triton that are
# supported; with which configurations is in the docstring of kernels/aot.py. Minutes where nothing of it is in the cache,
# seconds otherwise.
aot: $(STAMP) $(VENV36)/.installed
	$(BIN)/pytest -n 2 tests/csrc/test_cuda_compile.py
	$(BIN)/python -m albert_fast.kernels.aot --all $(ARGS)
	$(VENV36)/bin/python -m albert_fast.kernels.aot --all $(ARGS)

# albert_fast.hf with the oldest transformers that is supported.
test-transformers4: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest -n 2 tests/hf $(ARGS)

# Environments that have an older Triton, or transformers, to themselves and find all else in .venv.
$(VENV36)/.installed: INSTALLS = triton==3.6.0
$(VENV4)/.installed: INSTALLS = transformers==4.57.6 'huggingface_hub==0.36.2' 'tokenizers==0.22.2' \
	requests urllib3 certifi charset_normalizer idna
$(VENV36)/.installed $(VENV4)/.installed: $(STAMP)
	test -x $(@D)/bin/python || $(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/pip --python $(@D)/bin/python install -q --no-deps $(INSTALLS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/all_else.pth"
	touch $@

# The tests of csrc under AddressSanitizer and UndefinedBehaviorSanitizer, with a library built for them.
sanitize: export ALBERT_FAST_CXXFLAGS = -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
sanitize: $(STAMP)
	$(BIN)/albert-fast build
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest tests/csrc $(ARGS)

# On a machine with a GPU, in the environment that is there (no .venv, no network): parity tests and benchmarks, stage by
# stage, and their report in OUT. Which stages there are, and what they may take: `python benchmarks/gpu.py --help`.
gpu:
	$(PYTHON) benchmarks/gpu.py $(or $(OUT),benchmarks/results/gpu) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
