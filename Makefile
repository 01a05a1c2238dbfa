# Every target sets up .venv (test-floor: .venv-floor) by itself and does nothing there when it is up to date.
PYTHON ?= python3
# Threads that spin while they wait make a busy machine several times slower.
export OMP_WAIT_POLICY ?= passive
# The build for machines without a torch. On a CPU machine this version comes as a small CPU build where
# one is at hand; a torch that the chosen python has already is used as it is.
TORCH ?= $(shell grep '^torch==' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEEPSPEED := $(VENV)/.deepspeed
FLOOR := .venv-floor

.PHONY: demo test test-slow test-all test-floor test-gpu test-deepspeed deepspeed lint types studies studies-smoke clean

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/demo.py

# Two at a time, of different files: those of one share what they have launched.
TWO := -n 2 --dist loadfile

# The science, and the Trainer on one process: five minutes on two cores.
test: $(READY)
	$(BIN)/python -m pytest $(TWO) -m 'not slow' --ignore tests/recipes

# Which of the slow tests: .ci/run leaves out those that are `long` too.
SLOW := slow

# Many processes, trainings of more than a few steps; recipes, all of them for three steps on one process and on two;
# launches that fail, kills and signals; studies. It takes twenty minutes. DeepSpeed's are those of `make test-deepspeed`.
test-slow: $(READY)
	@# In the order of tests/conftest.py, and not by the number of tests in a file.
	$(BIN)/python -m pytest $(TWO) --no-loadscope-reorder -m '$(SLOW)' -k 'not deepspeed'

test-all: test test-slow studies-smoke test-deepspeed test-floor

# A part of the tests with the oldest versions that pyproject.toml allows, which warn of what is newer beside them.
# trl 1.0 logs other numbers of its KTO.
FLOOR_TESTS := $(addprefix tests/trainer/test_,callback.py every_trainer.py guided_trainer.py) tests/recipes/test_pretrain.py \
	-k '(two_lines or decay_groups or resumed_run or micro_batches or auto_lr or make_ or lora or needs_no_steps) and not make_kto'

test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest $(TWO) -W default $(FLOOR_TESTS)

# The trainings of these tests on a GPU, and what only a GPU has. Needs a torch that sees one, whose warnings no test
# here has seen.
GPU_TESTS := $(addprefix tests/trainer/test_,cuda.py callback.py every_trainer.py guided_trainer.py sharpness_callback.py)

test-gpu: $(READY)
	HF_WARMUP_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -n 4 -W default $(GPU_TESTS)

test-deepspeed: $(DEEPSPEED)
	$(BIN)/python -m pytest $(TWO) -m '$(SLOW)' -k deepspeed tests/trainer/test_deepspeed.py \
		tests/recipes/test_pretrain.py tests/recipes/test_commands.py

# The extra, from source and without compiling its kernels: none is needed on a CPU, and on a GPU they compile when used.
deepspeed: $(DEEPSPEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

STUDIES := phase_study catapult_study second_moment_study baselines_study sharpness_study cliff_study descent_study

# Six hours on two cores; warmup_study.py takes a day, remedies_study.py 45 minutes. What is in
# recipes/studies/results is not run again.
studies: $(READY)
	for study in $(STUDIES); do $(BIN)/python recipes/studies/$$study.py || exit 1; done
	$(BIN)/python recipes/studies/claims.py --all

# Every method of every study at its first and last learning rate, small: two minutes.
studies-smoke: $(READY)
	rm -rf runs/studies-smoke
	@# Two at a time, each in its own process: a pool of each would import everything three times.
	{ printf '%s.py\n' $(STUDIES); echo warmup_study.py gpt random ablation; echo remedies_study.py gpt; } \
		| sed 's|^|recipes/studies/|; s|$$| --smoke --processes 1|' | xargs -P 2 -L 1 $(BIN)/python
	$(BIN)/python recipes/studies/claims.py --smoke

clean:
	rm -rf $(VENV) $(FLOOR) runs .mypy_cache .pytest_cache .ruff_cache

# $(call set_up,folder,constraints,what to install): a version in the first of the constraints is the one that counts.
define set_up
	$(PYTHON) -m venv $(1)
	@# A torch outside the folder is lent to it: it sees the folder that torch lives in, behind its own.
	@$(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null \
		> $(1)/torch.pth || rm -f $(1)/torch.pth
	@if [ -e $(1)/torch.pth ]; then \
		mv $(1)/torch.pth $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/; fi
	$(1)/bin/python -c 'import torch' 2>/dev/null || $(1)/bin/python -m pip install '$(TORCH)'
	@# The tested versions of everything else; torch stays the one that is there.
	awk -F '[= ]' '!/^(torch=|#|$$)/ && !($$1 in seen); {seen[$$1]}' $(2) > $(1)/constraints.txt
	$(1)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		>> $(1)/constraints.txt
	$(1)/bin/python -m pip install -c $(1)/constraints.txt $(3)
	touch $(1)/.ready
endef

$(READY): pyproject.toml constraints.txt
	$(call set_up,$(VENV),constraints.txt,-e '.[dev]')

$(FLOOR)/.ready: pyproject.toml constraints.txt constraints-floor.txt
	$(call set_up,$(FLOOR),constraints-floor.txt constraints.txt,-e '.[recipes]' pytest pytest-xdist)

$(DEEPSPEED): $(READY)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -c $(VENV)/constraints.txt deepspeed
	touch $(DEEPSPEED)
