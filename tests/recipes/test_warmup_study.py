import math
from dataclasses import replace

import pytest

import warmup_study
from warmup_cases import CNN, Setting, make_model, train, unigram_entropy
from warmup_rules import RULES, cosine, linear, ramp
from warmup_study import GPT, SEEDS, TUNING, Curve, Job, curves, run, tuned, window

TINY = Setting("tiny", width=16, depth=1, context=16, batch=4, steps=6, dropout=0.1)


def test_rules_are_what_they_are_called():
    setting = replace(GPT, steps=100)
    warm = linear(setting, "AdamW", 0.2, fraction=0.1)
    assert [warm(t, None) for t in range(10)] == pytest.approx([0.02 * (t + 1) for t in range(10)])
    assert warm(10, None) == 0.2
    assert warm(55, None) == pytest.approx(0.2 * 0.55)  # half way down the cosine to a tenth
    assert linear(setting, "AdamW", 0.2)(0, None) == 0.2
    rise = ramp(setting, "AdamW", 0.2, growth=2.0, init=1e-3)
    assert [rise(t, None) for t in range(3)] == pytest.approx([1e-3, 2e-3, 4e-3])
    reach = math.log2(200)
    assert rise(50, None) == pytest.approx(0.2 * cosine(50 - reach, 100 - reach))
    at = {
        name: RULES[name](setting, "AdamW", 1.0)(9, None) / cosine(9, 100)
        for name in RULES
        if "b2" in name or "un" in name
    }
    assert at["sqrt(1-b2^t)"] == pytest.approx(math.sqrt(1 - 0.95**10))
    assert at["untuned linear"] == pytest.approx(10 / 40)
    assert at["untuned exponential"] == pytest.approx(1 - math.exp(-0.5))


@pytest.mark.parametrize("rule", ["guided", "persistent"])
@pytest.mark.parametrize("family", ["gpt", "bert", "llama"])
def test_a_run_is_the_same_with_trials_and_without(rule, family):
    setting = replace(TINY, family=family)
    rates = []

    def noted(step, loss_at):
        rates.append(guide(step, loss_at))
        return rates[-1]

    guide = RULES[rule](setting, "AdamW", 1e-2)
    tried = train(setting, "AdamW", noted, 0)
    plain = train(setting, "AdamW", lambda step, loss_at: rates[step], 0)
    assert tried["probes"] > 1
    assert plain["probes"] == 0
    assert tried["loss"] == plain["loss"]


def test_a_run_that_diverges_ends_with_an_infinite_loss():
    assert train(replace(CNN, steps=30), "SGD", lambda step, loss_at: 1e6, 0)["loss"] in (
        math.inf,
        pytest.approx(math.nan, nan_ok=True),
    )


def test_a_scaled_model_is_scaled_in_its_matrices():
    weight = make_model(replace(TINY, init_scale=0.0)).transformer.h[0].mlp.c_fc.weight
    assert not weight.any()
    assert unigram_entropy(TINY) == pytest.approx(3.3, abs=0.3)


def test_a_finished_run_is_not_repeated_and_an_unfinished_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup_study, "RESULTS", tmp_path)
    made = [Job(TINY, "AdamW", "linear", {"fraction": f}, 1e-3, 0) for f in (0.0, 0.5)]
    monkeypatch.setattr(warmup_study, "jobs", lambda part: iter(made[: len(warmup_study.read(part)) + 1]))
    warmup_study.finish("tiny", 1)
    first = warmup_study.read("tiny")
    warmup_study.finish("tiny", 1)
    second = warmup_study.read("tiny")
    assert second[:1] == first
    assert len(second) == 2
    warmup_study.finish("tiny", 1)
    assert warmup_study.read("tiny") == second


def test_one_set_of_seeds_chooses_length_and_target_and_the_other_is_reported():
    assert not set(TUNING) & set(SEEDS)

    def row(seed, rule, options, target, loss):
        names = {"optimizer": "AdamW", "rule": rule, "options": options, "seed": str(seed)}
        return {**names, "target": str(target), "loss": str(loss), "first": "5", "probes": "0"}

    # On the seeds that are reported the other length and the next target are the better ones.
    rows = [
        row(seed, "linear", f'{{"fraction": {f}}}', 2.0**k * 1e-3, 2 + (k - best) ** 2 + abs(f - length))
        for seeds, best, length in ((TUNING, 3, 0.0), (SEEDS, 4, 0.1))
        for seed in seeds
        for f in (0.0, 0.1)
        for k in range(9)
    ] + [row(seed, "guided", "{}", 2.0**k * 1e-3, 1.0) for seed in (*TUNING, *SEEDS) for k in range(9)]
    made = curves(rows)
    assert tuned(made).options == {"fraction": 0.0}
    assert tuned(made).chosen == 8e-3
    assert tuned(made).losses[8e-3] == pytest.approx([3.1] * len(SEEDS))
    assert window(made) == [2.0**k * 1e-3 for k in range(1, 7)]


@pytest.mark.parametrize(
    ("losses", "near"),
    [
        ([3.0, 2.04, 2.0, 2.049, 2.06, 2.01], [2, 4, 8]),  # not beyond a gap
        ([2.0, 2.0, 9.0], [1, 2]),
        ([math.inf, math.nan, 2.0], [4]),
        ([2.04, 2.03, 2.0], [1, 2, 4]),
    ],
)
def test_a_method_is_near_its_best_from_one_target_to_another_without_a_gap(losses, near):
    by_target = {2.0**k: [loss] for k, loss in enumerate(losses)}
    assert Curve("AdamW", "guided", {}, by_target, 5.0, 0.0, by_target).near == near


@pytest.mark.slow
def test_the_committed_tables_are_those_of_the_committed_runs():
    committed = (warmup_study.RESULTS / "warmup_study.md").read_text().rsplit("\n\nMeans ±", 1)[0]
    assert committed == warmup_study.report().rsplit("\n\nMeans ±", 1)[0]


@pytest.mark.slow
def test_a_committed_run_can_be_made_again():
    job = next(job for job in warmup_study.jobs("random") if job.rule == "guided")
    again = run(job)
    (row,) = [r for r in warmup_study.read("random") if all(r[k] == again[k] for k in warmup_study.KEYS)]
    assert float(row["loss"]) == pytest.approx(float(again["loss"]), rel=0.02)  # another CPU rounds otherwise


@pytest.mark.parametrize("part", warmup_study.COMPARED)
def test_the_guesses_are_multiples_of_the_best_target_of_tuned_linear_warmup(part):
    reference = tuned(curves(warmup_study.read(part)))
    assert warmup_study.COMPARED[part][2] == reference.chosen
    assert [guess / reference.chosen for guess in warmup_study.guesses(part)] == pytest.approx(warmup_study.GUESSES)
