"""DDP and FSDP2 on two processes, against one process with the same global batch.

accelerate shards on accelerators only: FSDP2 runs on these CPUs because processes.py tells it that it is on some.
"""

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

pytestmark = pytest.mark.slow

GIVEN = {**LINEAR, "init_lr": "3e-4", "save_strategy": "no"}  # where the search starts warmup: at η_trgt / 10
SGD = {"learning_rate": 1e3, "optim": "sgd", "gi_adam": False, "init_lr": "catapult"}
ADAM = {"learning_rate": 30, "init_lr": "catapult", "max_grad_norm": 0.3}
FOUND = {"max_steps": 1, "warmup_steps": 1}
RUNS = {
    "linear": {**LINEAR, "max_grad_norm": 100.0},  # so that v is the square of a gradient that is not clipped
    "given": {**GIVEN, "max_grad_norm": 100.0},
    "guided": {**GUIDED, "count": True},
    "muon": {**GUIDED, "muon": True, "adam_beta2": 0.95, "ramp_steps": None},
    "sgd": {**SGD, **FOUND},
    "adam": {**ADAM, **FOUND},
    "watched": {**GIVEN, "max_grad_norm": 100.0, "sharpness": {"every": 4}},
    "both": {**LINEAR, "save_strategy": "no", "max_grad_norm": 100.0, "sharpness": {"every": 4}},
}
HESSIAN = {"max_steps": 4, "warmup_steps": 4, "sharpness": {"every": 2, "kind": "preconditioned"}}


def runs(backend, **more):
    return [{"name": name, "backend": backend, **options} for name, options in {**RUNS, **more}.items()]


def resumed(folder, name, step, **changes):
    checkpoint = str(folder / name / f"checkpoint-{step}")
    return {**RUNS[name.partition("_")[0]], "resume": checkpoint, "save_strategy": "no", **changes}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "one"
    accumulated = {**RUNS["linear"], "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    launch(folder, 1, *runs("ddp", accumulated={**accumulated, "save_strategy": "no"}, hessian=HESSIAN))
    return folder


@pytest.fixture(scope="module")
def ddp(one):
    folder = one.parent / "ddp"
    more = {f"from_{step}": resumed(folder, "linear", step) for step in (4, 12)}
    for name in ("guided", "muon"):
        more[f"{name}_from_12"] = resumed(folder, name, 12)
    more["grown"] = resumed(one, "linear", 4)
    for name in ("linear", "given"):
        # Two steps: what DDP does before the second one depends on the last forward pass, and later steps hide it.
        options = {**RUNS[name], "max_steps": 2, "warmup_steps": 2, "save_strategy": "no"}
        more[f"batch_norm_{name}"] = {**options, "batch_norm": True}
    more["hessian"] = HESSIAN
    more["refused_differing"] = {"differ": ["init_lr", "1e-5"]}
    more["refused"] = {"fsdp": True, "fsdp_config": {"version": 2}}
    launch(folder, 2, *runs("ddp", **more))
    return folder


@pytest.fixture(scope="module")
def fsdp2(one):
    folder = one.parent / "fsdp2"
    more = {f"from_{step}": resumed(folder, "linear", step) for step in (4, 12)}
    for name in ("guided", "muon"):
        more[f"{name}_from_12"] = resumed(folder, name, 12)
    more["linear_full"] = {**RUNS["linear"], "backend": "fsdp2_full"}
    more["full_from_4"] = resumed(folder, "linear_full", 4, backend="fsdp2_full")
    more["refused_hessian"] = HESSIAN
    more["few_tokens"] = {**FOUND, "tokens": 25}  # of 50: one half of the embedding has no gradient
    more["memory"] = {**FOUND, "learning_rate": 1e-2, "memory": True}
    launch(folder, 2, *runs("fsdp2", **more))
    return folder


@pytest.fixture(params=["ddp", "fsdp2"])
def two(request):
    return request.getfixturevalue(request.param)


def test_two_processes_are_two_and_sharded_if_asked(ddp, fsdp2):
    for folder, wrapped in ((ddp, "DistributedDataParallel"), (fsdp2, "FSDPLlamaForCausalLM")):
        seen = Seen(folder, "linear")
        assert [process["world_size"] for process in seen.processes] == [2, 2]
        assert seen.processes[0]["wrapped"] == wrapped


def without_times(entry):
    return {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("name", ["linear", "guided", "sgd", "adam"])
def test_the_run_is_that_of_one_process_with_the_same_global_batch(name, two, one):
    seen = Seen(two, name)
    assert_same_run(seen, Seen(one, name))
    first, second = ([without_times(e) for e in process["history"]] for process in seen.processes)
    assert first == second


def test_guided_warmup_measures_what_one_process_measures(two, one):
    assert_same_rule(Seen(two, "guided"), Seen(one, "guided"))


def test_guided_warmup_takes_one_collective_per_step_to_the_valley_and_none_after_it(two):
    for process in Seen(two, "guided").processes:
        asked = process["rule"]["valley_step"] + 1
        assert process["collectives"] == [1] * asked + [0] * (GUIDED["max_steps"] - asked)


def test_guided_warmup_on_muon_is_that_of_one_process_to_the_precision_of_its_steps(two, one):
    seen, reference = Seen(two, "muon"), Seen(one, "muon")
    # The matrices are made orthogonal in bfloat16.
    assert seen.numbers("loss") == pytest.approx(reference.numbers("loss"), rel=1e-2)
    assert seen.numbers("learning_rate") == pytest.approx(reference.numbers("learning_rate"), rel=1e-2)
    assert seen.processes[0]["rule"]["valley_step"] == reference.processes[0]["rule"]["valley_step"]


def test_accumulation_changes_nothing(one):
    assert_same_run(Seen(one, "accumulated"), Seen(one, "linear"))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_search_has_something_to_find(name, one):
    (status,) = Seen(one, name).numbers("warmup/status")
    assert status == "found"


def test_the_loss_before_the_step_is_the_steps_own(two):
    seen = Seen(two, "sgd")
    assert seen.numbers("warmup/evals")[0][0][1] == seen.numbers("loss")[0]


def test_the_second_moment_starts_at_the_square_of_the_reduced_gradient(two, one):
    assert_v0_is_squared_gradient(Seen(two, "linear"), Seen(one, "linear"))


def test_a_shard_whose_gradient_is_zero_does_not_wait_if_another_of_its_parameter_has_one(fsdp2):
    for process in Seen(fsdp2, "few_tokens").processes:
        assert set(process["counts"]) == {1.0}


def test_a_search_leaves_no_trace(two):
    assert_equal(Seen(two, "linear").weights, Seen(two, "given").weights)


def assert_same_numbers(seen, reference, name, rel, rel_of_first):
    found, expected = seen.numbers(name), reference.numbers(name)
    assert len(found) > 1
    assert found[0] == pytest.approx(expected[0], rel=rel_of_first)
    assert found[1:] == pytest.approx(expected[1:], rel=rel)
    for process in seen.processes:
        assert [entry[name] for entry in process["history"] if name in entry] == found


@pytest.mark.parametrize("name", ["watched", "both"])
def test_critical_sharpness_is_that_of_one_process_and_leaves_no_trace(name, two, one):
    """Also where warmup searches in the same step."""
    seen = Seen(two, name)
    # The first search comes from far below, where how the loss is rounded decides where it goes on.
    assert_same_numbers(seen, Seen(one, name), "sharpness/critical", 1e-3, 5e-2)
    assert_equal(seen.weights, Seen(two, "given").weights)


def test_the_hessians_products_are_averaged_under_ddp_and_refused_under_fsdp2(ddp, fsdp2, one):
    assert_same_numbers(Seen(ddp, "hessian"), Seen(one, "hessian"), "sharpness/preconditioned", 1e-2, 1e-2)
    assert (
        "kind=preconditioned cannot be measured with Trainer here"
        in Seen(fsdp2, "refused_hessian").processes[0]["error"]
    )


def test_a_search_leaves_no_trace_in_buffers_that_ddp_sends_around(ddp):
    searched, given = Seen(ddp, "batch_norm_linear"), Seen(ddp, "batch_norm_given")
    assert_equal(searched.weights, given.weights)
    for one, other in zip(searched.processes, given.processes, strict=True):
        assert one["buffers"] == other["buffers"]


@pytest.mark.parametrize(
    ("name", "unbroken"),
    [
        ("from_4", "linear"),
        ("from_12", "linear"),
        ("guided_from_12", "guided"),
        ("muon_from_12", "muon"),
        ("full_from_4", "linear_full"),
    ],
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(name, unbroken, two):
    if "full" in name and two.name == "ddp":
        name, unbroken = "from_4", "linear"  # DDP has no other kind of checkpoint
    seen, reference = Seen(two, name), Seen(two, unbroken)
    assert_equal(seen.weights, reference.weights)
    assert seen.numbers("learning_rate") == reference.numbers("learning_rate")


def test_a_run_resumes_on_more_processes_and_on_fewer(ddp, fsdp2, one):
    folder = one.parent / "fewer"
    shrunk = {"ddp": resumed(ddp, "linear", 4), "fsdp2": resumed(fsdp2, "linear", 4)}
    shrunk["fsdp2_full"] = resumed(fsdp2, "linear_full", 4)
    launch(folder, 1, *({"name": backend, "backend": backend, **options} for backend, options in shrunk.items()))
    unbroken = Seen(one, "linear")
    for seen in (Seen(ddp, "grown"), *(Seen(folder, name) for name in shrunk)):
        assert_same_run(seen, unbroken)
        assert seen.numbers("learning_rate") == unbroken.numbers("learning_rate")


def test_the_search_on_shards_holds_one_copy_of_them(fsdp2):
    for process in Seen(fsdp2, "memory").processes:
        _, seen = process["memory"]  # the first pass checks the replay, at unchanged weights
        assert_one_copy(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "fails"),
    [("ddp", "loss"), *(pytest.param(*case, marks=pytest.mark.long) for case in [("fsdp2", "loss"), ("ddp", "step")])],
)
def test_a_process_that_fails_in_the_search_ends_all_with_its_reason_and_the_weights_restored(
    backend, fails, tmp_path
):
    guided = {"warmup": "guided", "warmup_steps": 0, "gi_adam": False}
    warmup = guided if fails == "step" else {"warmup_steps": 4}
    done = launch(tmp_path, 2, {"name": "run", "backend": backend, "fails": fails, **warmup}, fails=True)
    assert "RuntimeError: CUDA out of memory, they say" in done.stderr
    seen = Seen(tmp_path, "run")
    assert [process["restored"] for process in seen.processes] == [True, True]
    if backend == "ddp":
        assert "process 1 failed while learning rates were tried" in seen.processes[0]["error"]


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_learning_rates_of_an_unbroken_one(one, tmp_path):
    launch(tmp_path, 2, {**RUNS["linear"], "name": "linear", "backend": "fsdp2", "kill": [6, 1]}, fails=True)
    launch(tmp_path, 2, {**resumed(tmp_path, "linear", 4), "name": "again", "backend": "fsdp2"})
    assert_same_run(Seen(tmp_path, "again"), Seen(one, "linear"))


def test_options_that_differ_between_processes_are_refused(ddp):
    error = Seen(ddp, "refused_differing").processes[0]["error"]
    assert error == "init_lr must be the same on all processes, got auto and others"


def test_sharding_that_accelerate_would_ignore_is_refused(ddp):
    assert "fsdp is set, but these 2 processes run as MULTI_CPU" in Seen(ddp, "refused").processes[0]["error"]
