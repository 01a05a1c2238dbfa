import json
import math
from dataclasses import replace

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import warmup_study
from grid import KEYS, appending, lines, rows, run
from reporting import RESULTS
from warmup_cases import CNN, Setting, make_model, train, unigram_entropy
from warmup_rules import RULES, cosine, linear, ramp
from warmup_study import AUTO, TIMES, TITLES, TUNING, compared, methods, study, tuned

GPT, LLAMA = (study(part).jobs[0].setting for part in ("gpt", "llama"))
SEEDS = (10, 11, 12)
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


@pytest.mark.parametrize("family", ["gpt", "bert", "modernbert", "llama", "llama-gqa", "qwen3", "cnn", "vit"])
def test_guided_warmup_is_told_what_is_a_decoder_as_the_trainer_tells_it(family):
    setting = replace(TINY, family=family)
    causal = type(make_model(setting)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert RULES["guided"](setting, "AdamW", 1.0).rule.decoder == causal


@pytest.mark.parametrize("rule", ["guided", "persistent"])
@pytest.mark.parametrize("family", ["gpt", "bert", "llama"])
def test_a_run_is_the_same_with_measurements_and_without(rule, family):
    setting = replace(TINY, family=family)
    rates = []
    guide = RULES[rule](setting, "AdamW", 1e-2)

    class Noted:
        begin = guide.begin

        def __call__(self, step, loss_at):
            rates.append(guide(step, loss_at))
            return rates[-1]

    measured = train(setting, "AdamW", Noted(), 0)
    plain = train(setting, "AdamW", lambda step, loss_at: rates[step], 0)
    assert (measured["probes"] > 0) == (rule == "persistent")
    assert len(set(rates)) > 2
    assert measured["loss"] == plain["loss"]


def test_guided_warmup_is_bounded_by_its_target_or_by_nothing():
    setting = replace(TINY, steps=40)
    bounded = RULES["guided"](setting, "AdamW", 1e-3)
    assert train(setting, "AdamW", bounded, 0)["peak"] == 1e-3
    assert bounded.rule.ended_by == "learning_rate"
    free = RULES["guided"](setting, "AdamW", 1e-3, auto_lr=True)
    assert train(setting, "AdamW", free, 0)["peak"] > 2e-3
    assert free.rule.learning_rate is None
    # Then the cosine.
    made, end = free.lr, free.end
    assert free(end + (40 - end) // 2, None) == pytest.approx(made * cosine((40 - end) // 2, 40 - end))


def test_the_llama_of_the_study_has_grouped_queries_and_tied_embeddings():
    model = make_model(LLAMA)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = make_model(replace(LLAMA, family="llama"))
    assert plain.config.num_key_value_heads == 6
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_a_run_that_diverges_ends_with_an_infinite_loss():
    assert train(replace(CNN, steps=30), "SGD", lambda step, loss_at: 1e6, 0)["loss"] in (
        math.inf,
        pytest.approx(math.nan, nan_ok=True),
    )


def test_a_scaled_model_is_scaled_in_its_matrices():
    weight = make_model(replace(TINY, init_scale=0.0)).transformer.h[0].mlp.c_fc.weight
    assert not weight.any()
    assert unigram_entropy(TINY) == pytest.approx(3.3, abs=0.3)


def row(seed, rule, options, target, loss, optimizer="AdamW"):
    names = {"optimizer": optimizer, "rule": rule, "options": json.dumps(options), "seed": seed}
    return {**names, "target": target, "loss": loss, "first": 5.0, "peak": target / 2}


# On the seeds that are reported the other length and the next target are the better ones.
LINEAR = [
    row(seed, "linear", {"fraction": f}, 2.0**k * 1e-3, 2 + (k - best) ** 2 / 9 + abs(f - length))
    for seeds, best, length in ((TUNING, 3, 0.3), (SEEDS, 4, 0.1))
    for seed in seeds
    for f in (0.1, 0.3)
    for k in range(9)
]


def test_one_set_of_seeds_chooses_length_and_target_and_the_other_is_reported():
    assert not {job.seed for part in TITLES for job in study(part).jobs if job.rule == "guided"} & {*TUNING}
    made = methods(LINEAR)
    assert tuned(made).options == {"fraction": 0.3}
    assert tuned(made).chosen == 8e-3
    line = compared(made)["tuned"]
    assert (line.target, list(line.losses)) == ("0.008", list(SEEDS))
    assert list(line.losses.values()) == pytest.approx([2 + 1 / 9 + 0.2] * len(SEEDS))


def test_guided_warmup_has_the_target_of_tuned_linear_warmup_a_multiple_of_it_or_none():
    guided = [row(seed, "guided", {}, 2.0**k * 1e-3, 2 + k / 10) for seed in SEEDS for k in range(9)]
    auto = [row(seed, "guided", AUTO, 1.0, 2.5) for seed in SEEDS]
    lines = compared(methods(LINEAR + guided + auto))
    assert lines["guided"] == ("guided", "0.008", dict.fromkeys(SEEDS, 2.3))
    assert lines[f"guided, {TIMES} times the target"].target == "0.064"
    assert lines["guided, auto_lr"] == ("guided, auto_lr", "finds 0.5 to 0.5", dict.fromkeys(SEEDS, 2.5))
    # Of linear warmup the best length there.
    high = lines[f"linear, {TIMES} times the target"]
    assert (high.target, high.losses[10]) == ("0.064", pytest.approx(2 + 4 / 9))
    texts = {claim.text: claim.verdict for claim in warmup_study.part_claims(methods(LINEAR + guided + auto), "x")}
    assert [text.split(" guided")[0] for text in texts] == [
        "Without a learning rate",
        "With the learning rate of tuned linear warmup",
        "With 8 times the learning rate of tuned linear warmup",
    ]
    assert list(texts.values()) == ["does not hold", "holds", "does not hold"]


def test_of_a_part_without_guided_runs_there_are_tables_of_what_is_there():
    assert list(compared(methods(LINEAR))) == ["tuned", f"linear, {TIMES} times the target"]
    assert "linear over 30% (tuned)" in warmup_study.part_table(methods(LINEAR))
    assert "over 30% to 0.008" in warmup_study.summary_table({"gpt": methods(LINEAR)})
    assert warmup_study.part_claims(methods(LINEAR), "") == []


@pytest.mark.parametrize("loss", [math.inf, 7.5])
def test_a_run_that_diverges_counts_as_one_that_ended_where_it_began(loss):
    (made,) = methods([row(10, "guided", {}, 1e-3, loss)])
    assert made.reported == {1e-3: {10: 5.0}}


def test_every_other_kind_of_warmup_has_the_line_that_was_best_on_the_seeds_that_choose():
    ramps = [
        row(seed, "ramp", {"growth": growth}, 1e-2, loss)
        for seeds, losses in ((TUNING, (2.5, 2.6)), (SEEDS, (2.8, 2.4)))
        for growth, loss in zip((1.03, 1.1), losses, strict=True)
        for seed in seeds
    ]
    radam = [row(seed, "linear", {}, 1e-2, 3.0, "RAdam") for seed in (*TUNING, *SEEDS)]
    table = warmup_study.part_table(methods(LINEAR + ramps + radam))
    assert "ramp, growth 1.03" in table
    assert "ramp, growth 1.1" not in table
    assert "RAdam, no warmup" in table


def test_the_committed_tables_are_those_of_the_committed_runs():
    assert (RESULTS / "warmup_study.md").read_text() == warmup_study.report(RESULTS)


def test_a_committed_run_can_be_made_again():
    job = next(job for job in study("random").jobs if job.rule == "linear")
    committed = lines(RESULTS, "warmup_random")[job.key()]
    assert float(committed["loss"]) == pytest.approx(float(run(job)["loss"]), rel=0.02)  # another CPU rounds otherwise


@pytest.mark.parametrize("part", [part for part in warmup_study.TITLES if rows(RESULTS, f"warmup_{part}")])
def test_a_part_asks_for_the_best_target_of_tuned_linear_warmup_and_a_multiple_of_it(part):
    best = tuned(methods(rows(RESULTS, f"warmup_{part}"))).chosen
    bounds = {job.target for job in study(part).jobs if job.rule == "guided" and job.options != AUTO}
    assert {best, TIMES * best} <= bounds


def test_the_tables_are_those_of_the_parts_that_have_runs(tmp_path):
    """Linear warmup of the GPT, and four random settings, of which one learns nothing."""
    with appending(tmp_path / "warmup_gpt.csv") as write:
        for job in study("gpt").jobs:
            if job.rule == "linear":
                write(line(job, 2 + abs(math.log2(job.target / 1e-2)) / 9))
    with appending(tmp_path / "warmup_random.csv") as write:
        for job in study("random").jobs[:20]:
            write(line(job, 3.0 if job.rule == "guided" or job.seed else 3.2))
    text = warmup_study.report(tmp_path)
    assert [part for part in text.splitlines() if part.startswith("## ")] == [
        "## All settings",
        "## GPT, AdamW (β2 = .95)",
        "## 200 random settings",
    ]
    assert "| guided           | 0 of 4 " in text
    assert "| RAdam, no warmup | 1 of 4 " in text
    assert warmup_study.claims(tmp_path) == []  # no part is finished
    assert len(warmup_study.plot(tmp_path).axes) == 2


def line(job, loss):
    numbers = {"loss": loss, "first": 4.8, "entropy": 3.2, "peak": job.target, "probes": 0}
    return dict(zip(KEYS, job.key(), strict=True)) | {k: str(v) for k, v in numbers.items()} | {"conditions": "here."}


def test_the_committed_page_is_that_of_the_committed_runs():
    assert (RESULTS / "warmup_study.md").read_text() == warmup_study.report(RESULTS)


def test_rivals_on_settings_that_were_not_made_have_no_numbers():
    table = warmup_study.rivals_table([])
    assert table.count("\n") == 1 + len(warmup_study.RIVALS) + 1
    assert "±" not in table


def test_parts_without_a_panel_have_a_plot_of_none(tmp_path):
    assert not any(axes.lines for axes in warmup_study.plot(tmp_path).axes)
