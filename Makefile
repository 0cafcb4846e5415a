# Two commands do everything: `make run` and `make test`. Both make the environment first.
PYTHON ?= python3
BIN := .venv/bin
CLUSTER := .venv-cluster/bin

.PHONY: run test environment bench cluster-environment lab-test

run: environment
	@$(BIN)/python sweeps/full_paper.py --preset quick; status=$$?; \
	  [ $$status -le 1 ] && $(BIN)/python analysis/figures.py && exit $$status  # 1: a run failed, draw the others

test: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

bench: environment
	$(BIN)/python bench/training.py
	$(BIN)/python bench/layers.py

environment: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "memlib needs Python 3.11 or later; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The tools for `ray up` and for AWS lie on top of .venv, which stays as it is (cluster/overrides.txt says why).
cluster-environment: .venv-cluster/.installed

.venv-cluster/.installed: .venv/.installed cluster/overrides.txt
	$(BIN)/python -m venv .venv-cluster
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > $$($(CLUSTER)/python -c 'import site; print(site.getsitepackages()[0])')/below.pth
	cluster/pins.sh > .venv-cluster/constraints.txt
	$(CLUSTER)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint .venv-cluster/constraints.txt --editable '.[cluster,lab]'
	sed "1s|.*|#!$(CURDIR)/$(CLUSTER)/python|" $(BIN)/ray > $(CLUSTER)/ray && chmod +x $(CLUSTER)/ray
	touch $@

lab-test: cluster-environment  # ray up on hosts in network namespaces: root, openssh-server, rsync, iproute2
	$(CLUSTER)/python -m pytest -m "lab or not lab" -rs tests/test_cluster_files.py tests/test_aws.py tests/lab
