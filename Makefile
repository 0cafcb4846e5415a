# Two commands do everything: `make run` and `make test`. Both make the environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint suite environment bench lab-test

run: environment
	@$(BIN)/python sweeps/full_paper.py --preset quick; status=$$?; \
	  [ $$status -le 1 ] && $(BIN)/python analysis/figures.py && exit $$status  # 1: a run failed, draw the others

test: environment
	@$(MAKE) --no-print-directory --jobs=2 lint suite  # side by side: Ray's sweeps leave a core idle half of the time

lint: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

suite: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # two at once, a core each

lab-test: environment  # ray up on hosts in network namespaces: root, openssh-server, rsync, iproute2
	$(BIN)/python -m pytest -m lab -rs tests/lab

bench: environment  # minutes; DATA=ROOT adds what needs CIFAR-10, BENCH=--full takes the sizes of the goals
	$(BIN)/python bench/all.py $(BENCH) $(if $(DATA),--data $(DATA))

environment: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "memlib needs Python 3.11 or later; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
