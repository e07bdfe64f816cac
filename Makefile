# make install | quickstart | test | thorough | lint | bench | robotics | scale | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
TESTS ?= tests
# Of all tests, without those that take minutes; of files that are named, every one.
SHORT := $(if $(filter tests,$(TESTS)),-m "not thorough")
INPUTS := pyproject.toml setup.py constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
BENCHMARKS := $(filter-out gpu table scale learner endurance memory_plan prompt_files study_many bf16,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))
BENCH_OUT ?= build/benchmarks
# gymnasium-robotics and dm_control do not run with the MuJoCo of constraints.txt; these do together (docs/robot.md).
ROBOTICS := mujoco==3.10.0 gymnasium-robotics==1.4.2 dm-control==1.0.43 shimmy[dm-control]==2.0.1
ROBOTICS_VENV ?= build/robotics
SCALE_VENV ?= build/scale
# One thread a process, and waiting threads that sleep: shared cores stay usable, runs are up to 4x faster on them.
export OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test thorough lint bench robotics scale clean

install: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed
	$(BIN)/unified-rl compare study=quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(SHORT) $(TESTS)

thorough: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m thorough $(TESTS)

lint: $(VENV)/.installed-dev build/typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typed $(BIN)/mypy -p unified_rl

bench: $(VENV)/.installed-bench
	@mkdir -p $(BENCH_OUT)
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; \
		HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/$$name.py --csv $(BENCH_OUT)/$$name.csv; done
	@$(BIN)/python benchmarks/table.py $(BENCH_OUT)

robotics:
	$(PYTHON) -m venv --clear $(ROBOTICS_VENV)
	grep -v '^mujoco' constraints.txt > $(ROBOTICS_VENV)/constraints.txt
	$(ROBOTICS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(ROBOTICS_VENV)/constraints.txt -e . pytest $(ROBOTICS)
	UNIFIED_RL_ROBOTICS=1 $(ROBOTICS_VENV)/bin/python -m pytest -rA -p no:cacheprovider tests/test_robotics.py

scale:
	$(PYTHON) -m venv --clear $(SCALE_VENV)
	$(SCALE_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray,lora]' pytest hypothesis
	UNIFIED_RL_SCALE=1 $(SCALE_VENV)/bin/python -m pytest -rA -p no:cacheprovider tests/test_ray.py tests/test_ray_launch.py tests/test_ray_nodes.py tests/test_fsdp.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment: on Debian, apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing unified-rl into $(VENV) (about a minute)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing unified-rl with its development tools into $(VENV) (about a minute)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

# mypy does not see the mapped packages of an editable install; a tree of links shows them under their real names.
.PHONY: build/typed
build/typed:
	@rm -rf $@ && mkdir -p $@/unified_rl
	@ln -s $(CURDIR)/unified_rl/* $(CURDIR)/envs $(CURDIR)/agents $(CURDIR)/configs $@/unified_rl/

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
