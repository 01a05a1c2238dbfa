import pytest

import reporting
from cliff_study import NAME, claims, edge_table, judged, lengths, lost, method, plot, report, warmup_table, worst
from grid import COLUMNS, KEYS, appending, complete, load, rows
from warmup_cases import Setting, make_model

STUDY = load(NAME)


def number(job):
    """Twice the steps gain .5; without warmup 4e-3 and more are lost, over 25 steps 8e-3 and more; guided never."""
    loss = 5.0 - 0.5 * (job.setting.steps // 200)
    bears = {0: 2e-3, 25: 4e-3}.get(job.options.get("length"), 1.0)
    if job.rule == "linear" and job.target > bears:
        loss += 1.0
    return loss + 0.01 * abs(job.target - 4e-3) / 1e-3 * (job.rule == "linear")


@pytest.fixture
def made(tmp_path):
    with appending(tmp_path / f"{NAME}.csv") as write:
        for job in STUDY.jobs:
            if job.setting.steps <= 200 and job.seed < 2:
                numbers = {"loss": number(job), "first": 9.0, "entropy": 5.5, "peak": 1, "probes": 0, "seconds": 1}
                line = dict.fromkeys(COLUMNS, "") | dict(zip(KEYS, job.key(), strict=True)) | {"conditions": "x."}
                write(line | {k: f"{v:.9g}" for k, v in numbers.items()})
    return rows(tmp_path, NAME)


def cells(table):
    """The cells of a Markdown table by the first of its row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: dict(zip(lines[0][1:], rest, strict=True)) for name, *rest in lines[2:]}


def test_a_run_is_lost_if_the_best_linear_warmup_of_half_the_steps_ends_lower(made):
    of = judged(made)
    assert {steps for _, steps in of} == {200}  # of 100 there are no halves
    for row in of["Llama, .28M", 200]:
        assert row["lost"] == (row["loss"] > 5.0)
        assert row["excess"] == pytest.approx(row["loss"] - 4.5)


def test_the_table_counts_the_runs_lost_from_the_best_target_on(made):
    table = cells(warmup_table(judged(made), lost))
    ours = {how: line["Llama, .28M, 200 steps"] for how, line in table.items()}
    assert ours["no warmup"] == "10 of 10"  # 4e-3 to 6.4e-2, two seeds
    assert ours["linear over 25"] == "8 of 10"
    assert ours["linear over 50"] == "2 of 10"  # 6.4e-2
    assert ours["guided"] == "0 of 10"
    assert ours["auto_lr"] == "0 of 2"
    assert ours["RAdam"] == "7 of 7"


def test_the_worst_run_is_measured_from_tuned_linear_warmup(made):
    table = cells(warmup_table(judged(made), worst))
    assert table["no warmup"]["Llama, .28M, 200 steps"] == "+1.60"  # 6.4e-2
    assert table["guided"]["Llama, .28M, 200 steps"] == "+0.00"


def test_the_edge_is_the_shortest_warmup_without_which_runs_are_lost(made):
    line = cells(edge_table(judged(made)))["Llama, .28M"]
    assert [line[f"{times} x"] for times in (1, 2, 4, 8)] == ["25", "50", "50", "50"]
    assert line["tuned linear"] == "4.50 (over 25 to 0.004)"
    assert line["guided's ramp"] == "67"


def test_a_warmup_that_loses_no_run_holds_its_claim_where_training_without_loses_some(made):
    assert {claim.verdict for claim in claims(made)} == {"holds"}
    (claim,) = (claim for claim in claims(made) if claim.where == "Llama, .28M, 200 steps")
    assert claim.measured == "guided 0 of 10, auto_lr 0 of 2, no warmup 10 of 10"
    calm = [row | {"loss": min(row["loss"], 4.5)} for row in made if row["steps"] == 200]
    calm += [row for row in made if row["steps"] == 100]
    assert {claim.verdict for claim in claims(calm)} == {"unclear"}
    lost = [row | {"loss": 6.0 if row["rule"] == "guided" else row["loss"]} for row in made]
    assert {claim.verdict for claim in claims(lost)} == {"does not hold"}


def test_every_method_of_a_model_has_a_row_of_its_own(made):
    assert list(lengths(judged(made)["Llama, .28M", 200])) == [
        *("no warmup", "linear over 25", "linear over 50", "linear over 100"),
        *("guided", "auto_lr", "GI-Adam", "RAdam", "Muon"),
    ]
    assert len(plot(made).axes) == 7  # five models in three rows of two, and the scale
    assert all(method(row) for row in made)


def test_the_residual_branches_begin_at_zero_if_asked():
    for family in ("llama", "qwen3"):
        model = make_model(Setting("", family, width=32, depth=1, zero_out=True))
        layer = model.model.layers[0]
        assert not layer.mlp.down_proj.weight.any()
        assert not layer.self_attn.o_proj.weight.any()
        assert layer.mlp.up_proj.weight.all()


def test_the_committed_page_is_that_of_the_committed_runs():
    assert report(complete(STUDY, reporting.RESULTS)) in (reporting.RESULTS / f"{NAME}.md").read_text()
