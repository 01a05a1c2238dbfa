import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import baselines_study
import catapult_study
import claims
import cliff_study
import descent_study
import grid
import peer_optimizers
import phase_study
import reporting
import second_moment_study
from evidence import boundary, curve, is_at_edge, loss_claim, overview, ratio, spread, times, verdict
from grid import COLUMNS, KEYS, Job, Study, appending, complete, finish, lines, load, page, rows, shard_of
from warmup_cases import CNN, OTHER_BATCH, Setting, losses, make_model, make_optimizer, train
from warmup_rules import RULES, cosine, linear
from warmup_starts import From, times_own_warmup

TINY = Setting("tiny", width=16, depth=1, context=8, batch=2, steps=2)
TINY_JOBS = [Job(TINY, "AdamW", "linear", {"fraction": f}, 1e-3, seed) for seed in (0, 1) for f in (0.0, 0.5)]


def write(folder, name, jobs, number):
    """The CSV that the jobs would have left, with the numbers of a function."""
    with appending(folder / f"{name}.csv") as line:
        for job in jobs:
            made = {"first": 4.8, "entropy": 3.2, "peak": job.target, "probes": 0, "seconds": 1} | number(job)
            keys = dict(zip(KEYS, job.key(), strict=True))
            line(
                dict.fromkeys(COLUMNS, "") | keys | {k: f"{v:.9g}" for k, v in made.items()} | {"conditions": "here."}
            )


def by_text(made):
    return {f"{claim.text} ({claim.where})": claim for claim in made}


def test_a_grid_is_every_combination_of_its_lists_one_seed_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "GRIDS", tmp_path)
    (tmp_path / "small.yml").write_text(
        """
        seeds: [3, 4]
        setting: {width: 16}
        runs:
          - {optimizer: [AdamW, RAdam], setting: {beta2: [0.9, 0.99]}, rule: linear, options: {fraction: [0.0, 0.1]},
             target: [1.0e-3, 2.0e-3, 4.0e-3]}
          - {optimizer: AdamW, setting: {beta2: 0.9}, rule: linear, options: {fraction: 0.0}, target: [1.0e-3]}
          - {optimizer: AdamW, rule: ramp, options: [{}, {growth: [1.1, 1.2]}], target: [1.0e-3], seeds: [5]}
        """
    )
    study = load("small")
    assert len(study.jobs) == 2 * (2 * 2 * 2 * 3) + 3  # the second block repeats a run of the first
    assert [job.seed for job in study.jobs] == [3] * 24 + [4] * 24 + [5] * 3
    assert [job.options for job in study.jobs[-3:]] == [{}, {"growth": 1.1}, {"growth": 1.2}]
    assert {(job.setting.width, job.setting.steps) for job in study.jobs} == {(16, 300)}
    smoke = load("small", smoke=True)
    assert {(job.seed, job.setting.steps) for job in smoke.jobs} == {(3, 10), (5, 10)}
    assert {job.target for job in smoke.jobs} == {1e-3, 4e-3}

    (tmp_path / "small.yml").write_text("{seeds: [0], runs: [{optimizer: AdamW, rule: cosine, target: [1.0]}]}")
    with pytest.raises(ValueError, match="rule must be one of linear, .*, got cosine"):
        load("small")
    (tmp_path / "small.yml").write_text("{seeds: [0], runs: [{optimizer: AdamW, rule: linear}]}")
    with pytest.raises(ValueError, match="a block of small.yml lacks target"):
        load("small")
    (tmp_path / "small.yml").write_text("{seed: [0], runs: [{optimizer: AdamW, rule: linear, target: [1.0]}]}")
    with pytest.raises(ValueError, match="unknown keys: seed"):
        load("small")


@pytest.mark.parametrize("study", claims.STUDIES, ids=lambda study: study.NAME)
def test_every_study_has_a_grid_of_three_seeds_and_five_targets_or_says_why(study):
    jobs = load(study.NAME).jobs
    assert len({job.seed for job in jobs}) >= 3
    assert len({job.key() for job in jobs}) == len(jobs)
    # η_trgt is not what two of them look for; another counts runs at the best and above.
    if study not in (catapult_study, cliff_study, descent_study):
        for optimizer in {job.optimizer for job in jobs}:
            assert len({job.target for job in jobs if job.optimizer == optimizer}) >= 5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_partition_the_grid(count, tmp_path):
    study = Study("tiny", TINY_JOBS)
    shards = [{job.key() for job in study.jobs[i - 1 :: count]} for i in range(1, count + 1)]
    assert sum(map(len, shards)) == len(set().union(*shards)) == 4
    if count == 3:
        finish(study, tmp_path, 1, (3, 3))
        assert [line["seed"] for line in lines(tmp_path, "tiny").values()] == ["1"]
        finish(study, tmp_path, 1, (1, 3))
        assert {row["seed"] for row in complete(study, tmp_path)} == {1}  # the other seed lacks a run
        finish(study, tmp_path, 1)  # makes what no shard has made
        assert [len(path.read_text().splitlines()) for path in grid.files(tmp_path, "tiny")] == [2, 3, 2]
        assert [row["keys"] for row in complete(study, tmp_path)] == [job.key() for job in study.jobs]


def test_a_shard_that_is_none_is_refused():
    assert shard_of("2/4") == (2, 4)
    with pytest.raises(ValueError, match="--shard must be i/n with i from 1 to n, got 0/4"):
        shard_of("0/4")


def test_a_finished_run_is_not_repeated_and_its_numbers_come_back(tmp_path):
    study = Study("tiny", TINY_JOBS[:2])
    finish(Study("tiny", TINY_JOBS[:1]), tmp_path, 1)
    first = (tmp_path / "tiny.csv").read_bytes()
    finish(study, tmp_path, 1)
    second = (tmp_path / "tiny.csv").read_bytes()
    assert second.startswith(first)
    assert len(second.splitlines()) == 3
    finish(study, tmp_path, 1)
    assert (tmp_path / "tiny.csv").read_bytes() == second
    made = train(TINY, "AdamW", linear(TINY, "AdamW", 1e-3, 0.5), 0)
    row = rows(tmp_path, "tiny")[1]
    assert row["loss"] == pytest.approx(made["loss"], rel=1e-5)
    assert (row["fraction"], row["beta2"], row["width"], row["init"]) == (0.5, 0.999, 16, None)
    assert "1 torch thread;" in row["conditions"]


def test_guided_warmup_with_a_bound_that_it_does_not_reach_gets_the_line_of_auto_lr(tmp_path):
    auto = Job(replace(TINY, width=32, context=32, steps=60), "AdamW", "guided", {"auto_lr": True}, 1.0, 0)
    high, low = auto._replace(options={}, target=10.0), auto._replace(options={}, target=1e-3)
    finish(Study("small", [high, low, auto]), tmp_path, 1)
    made = lines(tmp_path, "small")
    assert len(made) == 3
    assert 1e-3 < float(made[auto.key()]["peak"]) < 10
    for job in (high, low):
        own = grid.run(job)
        assert {k: own[k] for k in ("loss", "peak")} == {k: made[job.key()][k] for k in ("loss", "peak")}
    assert [made[job.key()]["seconds"] == "0" for job in (high, low, auto)] == [True, False, False]


def test_runs_of_several_commits_on_one_machine_name_it_once():
    made = [{"conditions": f"torch 2; one core; commit {of}; 2026-01-01."} for of in "bab"]
    made += [{"conditions": "torch 2; one core."}, {"conditions": "here."}]
    assert grid.made_with(made) == "here and torch 2; one core; commit a; 2026-01-01, b; 2026-01-01"


def test_a_row_that_a_killed_process_left_unfinished_is_cut_off(tmp_path):
    study, path = Study("tiny", TINY_JOBS[:2]), tmp_path / "tiny.csv"
    finish(study, tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert len(lines(tmp_path, "tiny")) == 1  # nor does a reader see it
    finish(study, tmp_path, 1)
    assert list(lines(tmp_path, "tiny")) == [job.key() for job in study.jobs]


def test_two_processes_cannot_write_one_file_nor_two_versions(tmp_path):
    with appending(tmp_path / "tiny.csv"), pytest.raises(RuntimeError, match="another process is writing"):
        finish(Study("tiny", []), tmp_path, 1)
    (tmp_path / "old.csv").write_text("setting,loss\n{},1\n")
    with pytest.raises(RuntimeError, match="has other columns"):
        finish(Study("old", []), tmp_path, 1)
    assert (tmp_path / "old.csv").read_text() == "setting,loss\n{},1\n"


def test_a_run_that_cannot_be_made_is_skipped_with_a_plain_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peer_optimizers.PACKAGES, "Prodigy", "package_of_nobody")
    jobs = [TINY_JOBS[0], TINY_JOBS[0]._replace(optimizer="Prodigy")]
    finish(Study("tiny", jobs), tmp_path, 1)
    assert "tiny: skips Prodigy, which needs: pip install 'package_of_nobody'" in capsys.readouterr().out
    assert [row["optimizer"] for row in complete(Study("tiny", jobs), tmp_path)] == ["AdamW"]
    jobs += [TINY_JOBS[0]._replace(rule="guided", options={"auto_lr": True})]
    assert [row["rule"] for row in complete(Study("tiny", jobs), tmp_path)] == ["linear"]  # it has no run yet


KILLED = """
import sys
from pathlib import Path
from grid import Job, Study, finish
from warmup_cases import Setting
if __name__ == "__main__":
    tiny = Setting("tiny", width=16, depth=1, context=8, batch=2, steps=2)
    jobs = [Job(tiny, "AdamW", "linear", {"fraction": 0.0}, 1e-3, seed) for seed in range(400)]
    finish(Study("tiny", jobs), Path(sys.argv[1]), 2)
"""


@pytest.mark.long
def test_a_killed_study_goes_on_and_makes_the_same_runs(tmp_path):
    script, path = tmp_path / "study.py", tmp_path / "tiny.csv"
    script.write_text(KILLED)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, script, tmp_path],
            env=os.environ | {"PYTHONPATH": str(Path(grid.__file__).parent)},
            stderr=log,
        )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

    before = list(lines(tmp_path, "tiny").values())
    assert 3 <= len(before) < 400
    seeds = sorted(int(line["seed"]) for line in before)
    study = Study("tiny", [TINY_JOBS[0]._replace(seed=seed) for seed in range(seeds[-1] + 3)])
    finish(study, tmp_path, 1)
    after = list(lines(tmp_path, "tiny").values())
    assert after[: len(before)] == before
    assert sorted(int(line["seed"]) for line in after) == list(range(seeds[-1] + 3))
    again = grid.run(study.jobs[seeds[0]])
    assert next(line["loss"] for line in before if int(line["seed"]) == seeds[0]) == again["loss"]


def test_warmup_from_a_start_saves_its_steps_and_keeps_the_decay():
    setting = Setting("", steps=1000)
    zero, rule = (From(setting, "AdamW", 0.2, start, fraction=0.1) for start in ("zero", 0.3))
    full, short = ([r(t, None) for t in range(1000)] for r in (zero, rule))
    assert full == pytest.approx([linear(setting, "AdamW", 0.2, 0.1)(t, None) for t in range(1000)])
    assert rule.found == pytest.approx({"init": 0.06, "saved": 29, "steps": 971})
    assert short[:71] == pytest.approx(full[29:100])  # T_reach = T_wrm (1 - f), on the same slope
    assert short[71:971] == full[100:]
    assert short[971:] == [None] * 29
    own = times_own_warmup(replace(setting, beta2=0.9), "AdamW", 0.2, 0.1)
    assert own(9, None) == pytest.approx(0.2 * 0.1 * (1 - 0.9**10) ** 0.5)
    with pytest.raises(ValueError, match="start must be"):
        From(setting, "AdamW", 0.2, "late")


@pytest.mark.parametrize(
    ("optimizer", "start", "expected"),
    [
        ("SGD", "20/λ", 2 / 4),
        # P = (1-β1) |g| at the first step, and GI-Adam's is 1 / √(1-β2) times that.
        ("AdamW", "20/λ", 2 * 12 / 4),
        ("AdamW", "38/λ", 3.8 * 12 / 4),
        ("GIAdamW", "20/λ", 2 * 12 / 4 / 0.05**0.5),
        ("AdamW", "critical", 2 * 3.0),  # a step of η moves θ = 3 by η: the loss is the same at -3
        ("SGD", "critical", 2 / 4),
        ("AdamW", "capped", 10.0),
    ],
)
def test_the_start_is_the_threshold_or_the_crossing(optimizer, start, expected):
    module = torch.nn.Module()
    module.theta = torch.nn.Parameter(torch.tensor([3.0]))
    setting = Setting("", steps=1000, beta2=0.95)
    made = make_optimizer(optimizer, setting, module)

    def loss_fn():
        return 2 * module.theta.square().sum()

    loss_fn().backward()
    rule = From(setting, optimizer, 100.0 if start != "38/λ" else 1000.0, start, fraction=0.3)
    rule.begin(made, module, loss_fn)
    moved = (lambda lr: 2 * (3 - lr * 12) ** 2) if optimizer == "SGD" else (lambda lr: 2 * (3 - lr) ** 2)
    rule(0, moved)
    if start == "critical":  # within δ of the loss: η_c is the upper end of its bracket
        assert expected <= rule.found["critical_lr"] < 1.1 * expected
    elif start == "capped":
        assert rule.found["critical_lr"] == pytest.approx(6.0, rel=1 / 16)
    else:
        assert rule.init == pytest.approx(expected, rel=1e-3)


def test_v0_is_of_another_batch_or_a_multiple():
    seen = {}

    class Look:
        def begin(self, optimizer, model, loss_fn):
            seen["v0"] = [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()]

        def __call__(self, step, loss_at):
            return None

    assert math.isfinite(train(TINY, OTHER_BATCH, Look(), 0)["loss"])
    torch.manual_seed(0)
    model = make_model(TINY)
    next(losses(TINY, model, False, 10_000))().backward()
    for v0, p in zip(seen["v0"], model.parameters(), strict=True):
        torch.testing.assert_close(v0, p.grad.square())

    for name, alpha in (("GIAdamW", 1.0), ("GIAdamW, 10 v0", 10.0), ("GIAdamW, 100 v0", 100.0)):
        theta = torch.nn.Parameter(torch.zeros(3))
        module = torch.nn.ParameterList([theta])
        optimizer = make_optimizer(name, replace(TINY, beta2=0.95), module)
        theta.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(-theta.detach(), torch.full((3,), (0.05 / (0.95 * alpha + 0.05)) ** 0.5))


@pytest.mark.parametrize("name", ["Muon", "ScheduleFree+"])
def test_an_optimizer_of_others_trains(name):
    if peer_optimizers.missing(name):
        pytest.skip(f"{name} is not installed")
    made = train(TINY, name, lambda step, loss_at: 1e-2, 0)
    assert made["loss"] < made["first"]


def test_an_optimizer_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="no optimizer is called 'Adam2'"):
        make_optimizer("Adam2", TINY, make_model(TINY))


def test_schedule_free_plus_steps_by_polyaks_step():
    """At first x = y = z, so η = f / (√(π/2) ‖g‖₁), and Adam's step is η in every element."""
    weights = torch.nn.ParameterList([torch.ones(3, dtype=torch.float64)])
    optimizer = make_optimizer("ScheduleFree+", replace(TINY, steps=100), weights)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0
    optimizer.train()
    loss = weights[0] @ torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64) + 5
    loss.backward()
    optimizer.loss = loss.item()
    optimizer.step()
    step = 5 / (math.sqrt(math.pi / 2) * 6)
    expected = 1 - step * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    for at in (optimizer.eval, optimizer.train):
        at()
        torch.testing.assert_close(weights[0].detach(), expected, rtol=1e-7, atol=0.0)


def test_a_cnn_with_norms_has_one_behind_every_convolution():
    names = [type(layer).__name__ for layer in make_model(replace(CNN, depth=3, norm=True))]
    assert names.count("GroupNorm") == names.count("Conv2d") == 3
    assert "GroupNorm" not in [type(layer).__name__ for layer in make_model(CNN)]
    assert set(RULES) < set(grid.RULES)
    assert cosine(0, 10) == 1.0


def test_a_boundary_is_interpolated_and_a_verdict_needs_the_interval_of_the_seeds():
    made = [
        {"target": 2.0**k, "seed": seed, "loss": 1.0 + max(0, k - 2) + 0.5 * seed, "first": 9.0}
        for k in range(6)
        for seed in (0, 1)
    ]
    of = curve(made)
    assert boundary(of, 2.5) == pytest.approx({0: 2**3.5, 1: 2**3})
    assert boundary(of, 99) == {0: math.inf, 1: math.inf}
    assert boundary(of, 0.0) == {0: 0.0, 1: 0.0}
    assert not is_at_edge(of)  # flat from the first target to the third
    assert is_at_edge({target: losses for target, losses in of.items() if target >= 4})
    assert is_at_edge({1.0: {0: 9.0}})
    diverged = curve([{"target": 1.0, "seed": 0, "loss": math.inf, "first": 9.0}])
    assert diverged == {1.0: {0: 9.0}}
    assert ratio({0: 8.0, 1: 6.0}, {0: 2.0, 1: math.inf}) == pytest.approx([4.0, math.nan], nan_ok=True)

    values = [0.9, 1.0, 1.1]  # ± 4.303 × .1 / √3 = ± .248
    assert [verdict(values, low=low) for low in (0.7, 0.8, 1.3)] == ["holds", "unclear", "does not hold"]
    assert [verdict(values, high=high) for high in (1.3, 1.2, 0.7)] == ["holds", "unclear", "does not hold"]
    assert verdict([1.0]) == verdict([1.0, math.nan]) == "unclear"
    assert spread(values, "+") == "+1.000 ± 0.100"
    assert times([2.0, 8.0]) == f"4 ×/÷ {math.exp(math.log(4) / 2**0.5):.2f}"
    assert times([2.0, math.inf]) == spread([1.0, math.inf]) == "beyond the grid"


def test_the_phase_diagram_finds_the_boundaries_it_was_given(tmp_path):
    def number(job):
        warmed = job.options["fraction"] == 0.3
        # A parabola in log2 η. GI-Adam's is 4 times AdamW's without warmup, and the same with it.
        best = 0.32 if job.optimizer == "SGD" else 2.5e-3 * (4 if warmed or "GI" in job.optimizer else 1)
        top = {"SGD": 0.2}.get(job.optimizer, 2.0) + 0.001 * job.seed
        return {
            "loss": top + 0.3 * math.log2(job.target / best) ** 2,
            "entropy": 2.3 if job.optimizer == "SGD" else 3.3,
        }

    study = load("phase_study")
    write(tmp_path, "phase_study", study.jobs, number)
    made = complete(study, tmp_path)
    assert len(made) == 1176
    of = by_text(phase_study.claims(made))
    for beta2 in ("0.95", "0.999"):
        tail = f"(GPT, β2 = {beta2})"
        for word in ("fails", "is 0.25 worse"):
            moved = of[f"Without warmup GI-Adam {word} only from a higher η_trgt on than AdamW {tail}"]
            assert (moved.measured, moved.verdict) == ("factor 4 ×/÷ 1.00, 3 seeds", "holds")
            same = f"With 30% warmup GI-Adam {word} from the same η_trgt on as AdamW, within a step of the grid {tail}"
            assert of[same].measured.startswith("factor 1 ")
        better = of[f"Without warmup GI-Adam is better than AdamW {tail}"]
        assert (better.measured, better.verdict) == ("+0.000 ± 0.000 nats, 3 seeds", "unclear")
        assert of[f"GI-Adam without warmup is as good as the best-warmed AdamW {tail}"].verdict == "holds"
    assert of["With 30% warmup SGD fails only from a higher η_trgt on (CNN)"].measured.startswith("factor 1 ")
    table = page(study, tmp_path, phase_study.report)
    assert "| GPT       | 0.95  | GIAdamW           | 0%      | 2.001 ± 0.001 | 0.01" in table
    assert "1176 runs, 0.33 hours of one thread; seeds 0, 1, 2; here." in table
    figure = phase_study.plot(made)
    assert len(figure.subfigs) == 3


def test_the_catapult_table_says_what_was_saved_and_what_it_cost(tmp_path):
    def number(job):
        start, steps = job.options["start"], round(job.options["fraction"] * 300)
        part = start if isinstance(start, float) else {"critical": 0.5, "zero": 1 / steps}.get(start, 0.1)
        hurts = start == "critical" and job.optimizer != "SGD"
        cost = 0.2 if hurts else 0.01 if start != "zero" else 0.0
        saved = round(part * steps) - 1
        return {
            "loss": 2.5 + 0.1 * job.seed + cost + 0.001 * job.seed * (start != "zero"),
            "saved": saved,
            "steps": 300 - saved,
            "passes": 10 if start == "critical" else 0,
        }

    study = load("catapult_study")
    write(tmp_path, "catapult_study", study.jobs, number)
    made = complete(study, tmp_path)
    of = by_text(catapult_study.claims(made))
    sgd = of["Starting at η_c of the first step (paper) costs less than 0.03 nats (CNN, SGD, saves 48% of T_wrm)"]
    assert (sgd.measured, sgd.verdict) == ("+0.011 ± 0.001 nats, 3 seeds", "holds")
    start = "Starting at η_c of the first step (paper) costs less than 0.03 nats"
    adam = of[f"{start} (GPT, AdamW, β2 = 0.95, saves 48% of T_wrm)"]
    assert (adam.measured, adam.verdict) == ("+0.201 ± 0.001 nats, 3 seeds", "does not hold")
    table = catapult_study.report(made)
    (line,) = [line for line in table.splitlines() if "GPT, SGD" in line and "η_c of the first step" in line][:1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # T_wrm = 30 and 90: 14 and 44 steps; the search took 10 forward passes, 5 steps.
    assert cells[2:] == ["0.52", "29.0", "24.0", "+0.011 ± 0.001", "+0.011", "is free"]
    assert "GPT, SGD: 0.3; " in table
    assert "In all of them: 0.3." in table
    assert len(catapult_study.plot(made).axes) == 2


def test_the_share_of_the_schedule_in_the_gain_is_what_it_was_given(tmp_path):
    def number(job):
        top = 2.4 if "sqrt" in job.rule else 3.0 if job.optimizer == "AdamW" else 2.2
        bowl = 0.01 * abs(math.log2(job.target / 5e-3))
        return {"loss": top + bowl + 0.01 * job.seed}

    study = load("second_moment_study")
    write(tmp_path, "second_moment_study", study.jobs, number)
    made = complete(study, tmp_path)
    of = by_text(second_moment_study.claims(made))
    for where in ("at the best η_trgt", "over the grid of η_trgt"):
        text = f"The automatic ramp explains more than half of GI-Adam's gain {where} (β2 = 0.999)"
        assert (of[text].measured, of[text].verdict) == ("75% of +0.800 ± 0.000 nats, 5 seeds", "holds")
    assert of["v_0 from another batch makes no difference (β2 = 0.95)"].verdict == "holds"
    assert "-0.800 ± 0.000" in second_moment_study.report(made)
    none = second_moment_study.explained("", "", {0: 3.0, 1: 3.0}, {0: 2.0, 1: 2.0}, {0: 3.1, 1: 2.8})
    assert (none.measured, none.verdict) == ("no sure gain: +0.050 ± 0.212 nats, 2 seeds", "unclear")
    assert len(second_moment_study.plot(made).axes) == 2


def test_a_baseline_is_compared_with_the_linear_warmup_that_is_tuned(tmp_path):
    def number(job):
        top = {"Muon": 2.0, "AdamW": 2.5}.get(job.optimizer, 2.6) + abs(job.options.get("fraction", 0.0) - 0.3)
        return {"loss": top + 0.1 * math.log2(job.target / 1e-2) ** 2 + 0.01 * job.seed}

    study = load("baselines_study")
    write(tmp_path, "baselines_study", [job for job in study.jobs if job.optimizer != "Prodigy"], number)
    made = complete(study, tmp_path)
    table = baselines_study.report(made)
    assert "AdamW, linear over 30% (tuned)" in table
    assert "Prodigy" not in table
    of = by_text(baselines_study.claims(made))
    muon = of["Muon is as good as tuned linear warmup of AdamW (GPT, β2 = 0.95) (no warmup)"]
    assert (muon.measured, muon.verdict) == ("-0.200 ± 0.000 nats, 5 seeds", "holds")
    assert (
        of["RAdam is as good as tuned linear warmup of AdamW (GPT, β2 = 0.95) (no warmup)"].verdict == "does not hold"
    )
    assert len(baselines_study.plot(made).axes) == 1


def test_a_sentence_that_the_seeds_decide_has_a_row_with_its_cases():
    values = {"there": [-0.1, -0.101, -0.099], "here": [0.1, 0.101, 0.099], "nowhere": [-1.0, 1.0]}
    made = [loss_claim("A is better", where, "us", "a_study", of, high=0.0) for where, of in values.items()]
    made.append(loss_claim("B is better", "", "us", "a_study", values["here"], high=0.0))
    made.append(loss_claim("C is better", "", "us", "a_study", values["nowhere"], high=0.0))
    assert overview(made).splitlines()[2:] == [
        "| A is better | us | [a_study](results/a_study.md) | there | here | nowhere |",
        "| B is better | us | [a_study](results/a_study.md) |  | +0.100 ± 0.001 nats, 3 seeds |  |",
    ]


def test_the_claims_go_between_the_markers_and_nowhere_else():
    before = f"# Studies\n\n{claims.BEGIN}old\n{claims.END}\n\nafter\n"
    page = claims.put(before, "| new |")
    assert page == f"# Studies\n\n{claims.BEGIN}\n| new |\n\n{claims.END}\n\nafter\n"
    assert claims.put(page, "| new |") == page
    with pytest.raises(ValueError, match="must have the markers"):
        claims.put("# Studies", "| new |")


COMMITTED = [study for study in claims.STUDIES if grid.files(reporting.RESULTS, study.NAME)]


@pytest.mark.parametrize("study", COMMITTED, ids=lambda study: study.NAME)
def test_a_committed_table_is_that_of_the_committed_runs(study):
    committed = (reporting.RESULTS / f"{study.NAME}.md").read_text()
    assert committed == page(load(study.NAME), reporting.RESULTS, study.report)


def test_the_claims_of_the_readme_are_those_of_the_committed_runs():
    readme, text = claims.README.read_text(), claims.text(reporting.RESULTS)
    assert claims.put(readme, text) == readme
    assert len(text.splitlines()) <= 2 + 40  # a page that can be read
