"""DeepSpeed's ZeRO-1, 2 and 3 on two processes, against one process with the same global batch.

`make test-deepspeed` installs DeepSpeed and runs these; without it they are skipped.
"""

import subprocess
import sys

import pytest

from launching import (
    GUIDED,
    LINEAR,
    Seen,
    assert_equal,
    assert_one_copy,
    assert_same_rule,
    assert_same_run,
    assert_v0_is_squared_gradient,
    launch,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make test-deepspeed` installs it")
pytestmark = pytest.mark.slow

UNCLIPPED = {**LINEAR, "max_grad_norm": 100.0}
GIVEN = {**LINEAR, "init_lr": "3e-4", "save_strategy": "no", "max_grad_norm": 100.0}
ADAM = {"max_steps": 1, "warmup_steps": 1, "learning_rate": 30, "init_lr": "catapult", "max_grad_norm": 0.3}
WATCHED = {**GIVEN, "sharpness": {"every": 4}}
BOTH = {**UNCLIPPED, "save_strategy": "no", "sharpness": {"every": 4}}
RUNS = {"linear": UNCLIPPED, "given": GIVEN, "guided": GUIDED, "adam": ADAM, "watched": WATCHED, "both": BOTH}
RESUMED = {**UNCLIPPED, "save_strategy": "no"}
ONE_STEP = {"max_steps": 1, "warmup_steps": 1}
MORE = {
    "memory": {**ONE_STEP, "learning_rate": 1e-2, "memory": True},
    "retried": {**UNCLIPPED, "save_strategy": "no", "auto_find_batch_size": True, "sharpness": {"every": 4}},
    "refused": {"sharpness": {"every": 2, "kind": "hessian"}},
}
SHARDED = ("linear", "given", "guided", "guided_from_12", "adam", "watched", "both", "from_4", "from_12")
NAMES = {
    "zero1": ("linear", "adam", "guided"),
    "zero2": (*SHARDED, "retried", "refused"),
    "zero3": (*SHARDED, "memory"),
    "zero2_bf16": ("linear", "given"),
    "zero3_bf16": ("linear", "given"),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed") / "one"
    launch(folder, 1, *({"name": name, **options} for name, options in RUNS.items()))
    return folder


def options_of(name, folder):
    kind, _, step = name.partition("_")
    if kind == "from":
        return {**RESUMED, "resume": str(folder / "linear" / f"checkpoint-{step}")}
    if name == "guided_from_12":
        return {**GUIDED, "save_strategy": "no", "resume": str(folder / "guided" / "checkpoint-12")}
    return {**RUNS, **MORE}[name]


@pytest.fixture(scope="module")
def run(one):
    """The run of that name on that backend: all of a backend's are made in one launch, when one is asked for."""
    made = set()

    def get(backend, name):
        folder = one.parent / backend
        if backend not in made:
            made.add(backend)
            runs = ({"name": name, "backend": backend, **options_of(name, folder)} for name in NAMES[backend])
            launch(folder, 2, *runs, forks=True)
        return Seen(folder, name)

    return get


ZERO1, ZERO2 = (pytest.param(backend, marks=pytest.mark.long) for backend in ("zero1", "zero2"))
every_stage = pytest.mark.parametrize("backend", [ZERO1, ZERO2, "zero3"])
sharded = pytest.mark.parametrize("backend", [ZERO2, "zero3"])
low_precision = [pytest.param(f"{backend}_bf16", marks=pytest.mark.long) for backend in ("zero2", "zero3")]


@every_stage
def test_the_run_is_that_of_one_process_with_the_same_global_batch(backend, run, one):
    seen = run(backend, "linear")
    assert [process["world_size"] for process in seen.processes] == [2, 2]
    assert seen.processes[0]["wrapped"] == "DeepSpeedEngine"
    assert_same_run(seen, Seen(one, "linear"))


@every_stage
def test_the_second_moment_starts_at_the_square_of_the_reduced_gradient(backend, run, one):
    assert_v0_is_squared_gradient(run(backend, "linear"), Seen(one, "linear"))


@every_stage
def test_the_search_finds_what_one_process_finds_along_clipped_gradients(backend, run, one):
    seen = run(backend, "adam")
    assert seen.numbers("warmup/status") == ["found"]
    assert_same_run(seen, Seen(one, "adam"))


@sharded
@pytest.mark.parametrize("name", ["watched", "both"])
def test_critical_sharpness_is_that_of_one_process_and_leaves_no_trace(backend, name, run, one):
    """Also where warmup searches in the same step."""
    seen = run(backend, name)
    found = seen.numbers("sharpness/critical")
    assert len(found) == 5
    expected = Seen(one, name).numbers("sharpness/critical")
    # Without the slope, and so by other trials: the brackets are a factor of 2 wide.
    assert found == pytest.approx(expected, rel=0.15)
    assert_equal(seen.weights, run(backend, "given").weights)


@pytest.mark.long
def test_warmup_and_sharpness_watch_the_engine_that_a_retry_has_made(run):
    seen = run("zero2", "retried")
    steps = [[e["step"] for e in seen.history if name in e] for name in ("warmup/init_lr", "sharpness/critical")]
    assert steps == [[0], [0, 4, 8, 12, 16]]
    assert seen.numbers("learning_rate")[0] == pytest.approx(3e-4)


@pytest.mark.long
def test_the_hessian_is_refused_under_deepspeed(run):
    assert "kind=hessian cannot be measured with Trainer here" in run("zero2", "refused").processes[0]["error"]


@every_stage
def test_guided_warmup_is_that_of_one_process(backend, run, one):
    assert_same_run(run(backend, "guided"), Seen(one, "guided"))
    assert_same_rule(run(backend, "guided"), Seen(one, "guided"))


@pytest.mark.parametrize("backend", [ZERO2, "zero3", *low_precision])
def test_a_search_leaves_no_trace_in_masters_or_low_precision_weights(backend, run):
    # A training step makes the next losses from the low-precision weights and the masters from themselves.
    searched, given = run(backend, "linear"), run(backend, "given")
    assert_equal(searched.weights, given.weights)
    assert searched.numbers("loss") == given.numbers("loss")


@sharded
@pytest.mark.parametrize(
    ("name", "unbroken"), [("from_4", "linear"), ("from_12", "linear"), ("guided_from_12", "guided")]
)
def test_a_resumed_run_has_the_losses_of_the_unbroken_one(backend, name, unbroken, run):
    unbroken, seen = run(backend, unbroken), run(backend, name)
    assert seen.numbers("learning_rate") == pytest.approx(unbroken.numbers("learning_rate"), rel=1e-6)
    assert seen.numbers("loss") == pytest.approx(unbroken.numbers("loss"), rel=1e-6)


@sharded
def test_a_run_resumes_on_fewer_processes_from_a_universal_checkpoint(backend, run, one):
    unbroken = run(backend, "linear")
    checkpoint = one.parent / backend / "linear" / "checkpoint-4"
    shrunk = {"name": "shrunk", "backend": backend, **RESUMED, "resume": str(checkpoint)}
    refused = launch(one.parent / backend, 1, shrunk, fails=True)
    assert "a DP world size of 2" in " ".join(refused.stderr.split())

    folders = [f"{checkpoint}/global_step4", f"{checkpoint}/global_step4_universal"]
    convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command = [sys.executable, *convert, "--input_folder", folders[0], "--output_folder", folders[1]]
    subprocess.run(command, check=True, capture_output=True)
    launch(one.parent / backend, 1, shrunk, LOAD_UNIVERSAL="1")
    seen = Seen(one.parent / backend, "shrunk")
    assert seen.numbers("learning_rate") == unbroken.numbers("learning_rate")
    assert seen.numbers("loss") == pytest.approx(unbroken.numbers("loss"), rel=1e-5)


def test_the_search_on_partitions_holds_one_copy_of_them(run):
    layer = 4 * (4 * 256 * 256 + 3 * 256 * 1024)  # bytes; the model has four, 16.9 MB with the rest
    seen = run("zero3", "memory")
    for process in seen.processes:
        _, found = process["memory"]  # the first pass checks the replay, at unchanged weights
        assert_one_copy(found)
        # The layer at work, the one gathered ahead, and the one before, which a thread may not have let go yet.
        assert found["forward"] < 3 * layer


REFUSED = [
    (
        {"config": {"scheduler": {"type": "WarmupLR"}}},
        "has a section scheduler, {'type': 'WarmupLR'}, which takes the place",
    ),
    ({"config": {"optimizer": {"type": "AdamW"}}}, "has a section optimizer"),
    ({"config": {"zero_optimization": {"stage": 0}}}, "stage 0 has no partitions to move"),
    (
        {"config": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        "that DeepSpeed offloads",
    ),
    (
        {"config": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}},
        "zero_hpz_partition_size=2",
    ),
    ({"muon": True, "gi_adam": False}, "asks for Muon, which needs whole matrices"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    runs = [{"name": f"refused_{i}", "backend": "zero2", **options} for i, (options, _) in enumerate(REFUSED)]
    launch(folder, 1, *runs, forks=True)
    return {said: Seen(folder, f"refused_{i}").processes[0]["error"] for i, (_, said) in enumerate(REFUSED)}


@pytest.mark.parametrize("message", [message for _, message in REFUSED])
def test_what_would_be_something_else_is_refused(refused, message):
    assert message in refused[message]


@pytest.mark.parametrize("backend", ["zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_process_that_fails_in_the_search_ends_all_with_its_reason_and_the_weights_restored(backend, tmp_path):
    done = launch(tmp_path, 2, {"name": "run", "backend": backend, "fails": "loss", "warmup_steps": 4}, fails=True)
    assert "RuntimeError: CUDA out of memory, they say" in done.stderr
    seen = Seen(tmp_path, "run")
    assert [process["restored"] for process in seen.processes] == [True, True]
    if backend == "zero2":
        assert "process 1 failed while learning rates were tried" in seen.processes[0]["error"]
