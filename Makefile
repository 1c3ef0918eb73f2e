# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= demo
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-slow test-chaos test-storm test-cluster test-formats lint format bench proto lock clean

setup: $(VENV)/.installed

# A machine without an NVIDIA driver gets the CPU build of torch where the package index has one:
# the plain wheel brings several GB of CUDA libraries.
$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python found; install Python 3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null 2>&1 \
		|| $(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" >/dev/null 2>&1 \
		|| echo "note: no CPU-only torch 2.13.0 in the package index; the plain build (with CUDA libraries) follows"
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/vla-dist run $(RUN)

test: setup
	$(BIN)/ruff check vla_dist tests benchmarks examples
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m "slow or gl"

test-chaos: setup
	$(BIN)/python -m pytest -m chaos -s

# The cluster's storm in its short form. Where there is no lab it is skipped, says why, and has shown nothing.
test-storm: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m cluster -rs tests/cluster/test_short_storm.py

# As root on Linux: machines are network namespaces with sshd, and a cloud that is not there has no way out either.
MOTO := .venv-peers/moto
test-cluster: setup
	@test "$$(id -u)" = 0 || { echo "make test-cluster needs root, for network namespaces"; exit 1; }
	@for p in ip rsync ssh sshd curl; do command -v $$p >/dev/null || test -x /usr/sbin/$$p || missing="$$missing $$p"; done; \
		test -z "$$missing" || { echo "missing:$$missing; apt-get install -y iproute2 openssh-server rsync curl"; exit 1; }
	$(BIN)/python -m pip install --quiet "boto3>=1.40,<2" "kubernetes-validate>=1.31,<2"
	@test -x $(MOTO)/bin/moto_server || { $(PYTHON) -m venv $(MOTO) && \
		$(MOTO)/bin/python -m pip install --quiet "moto[server,ec2,iam]==5.2.5" boto3==1.44.5; }
	$(BIN)/python -m pytest tests/run/test_cluster_file.py  # With the schemas of Kubernetes, which are there now.
	PATH="$(CURDIR)/$(BIN):$$PATH" VLA_DIST_LAB_REQUIRED=1 $(BIN)/python -m pytest -m "cluster and not chaos" -s tests/cluster

# The libraries of other formats beside what is installed here, in an environment of their own.
FORMATS := .venv-peers/formats
test-formats: setup
	@test -x $(FORMATS)/bin/rerun || { $(BIN)/python -m venv $(FORMATS) && \
		site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" \
			> "$$($(FORMATS)/bin/python -c "$$site")/beside.pth" && \
		$(FORMATS)/bin/python -m pip install --quiet "minari[hdf5]==0.5.4" tensorflow-cpu==2.21.0 \
			tensorflow-datasets==4.9.10 importlib-resources rerun-sdk==0.41.0; }
	VLA_DIST_FORMATS_REQUIRED=1 $(FORMATS)/bin/python -m pytest tests/run/test_other_formats.py

lint: setup
	$(BIN)/ruff format --check vla_dist tests benchmarks examples
	$(BIN)/ruff check vla_dist tests benchmarks examples
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff format vla_dist tests benchmarks examples
	$(BIN)/ruff check --fix vla_dist tests benchmarks examples

bench: setup
	$(BIN)/vla-dist bench replay
	$(BIN)/vla-dist bench serve
	$(BIN)/vla-dist bench fleet
	$(BIN)/vla-dist bench learner
	$(BIN)/vla-dist bench models
	$(BIN)/vla-dist bench scale

proto: setup
	$(BIN)/python -m vla_dist.protocol.generate
	$(BIN)/python tests/protocol/test_conventions.py

# Exact pins of what is installed now; the local build tag of torch is dropped so that a GPU machine can use it too.
lock:
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -v "^pip==" | sed 's/+cpu//' > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
