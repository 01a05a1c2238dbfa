import pytest

from descent_study import NAME, claims, models, needed, plot, report
from grid import COLUMNS, KEYS, appending, load, rows


def needs_of(depth):
    return 20 + 2 * depth


@pytest.fixture
def made(tmp_path):
    """The best are 64 steps; below its needs one seed of three ends a nat above them."""
    with appending(tmp_path / f"{NAME}.csv") as write:
        for job in load(NAME).jobs:
            steps = job.options["ramp_steps"]
            loss = 4.0 + 0.001 * abs(steps - 64) + (job.seed == 1 and steps < needs_of(job.setting.depth))
            numbers = {"loss": loss, "first": 9.0, "entropy": 5.5, "peak": 1, "probes": 0, "seconds": 1}
            line = dict.fromkeys(COLUMNS, "") | dict(zip(KEYS, job.key(), strict=True)) | {"conditions": "x."}
            write(line | {k: f"{v:.9g}" for k, v in numbers.items()})
    return rows(tmp_path, NAME)


def test_a_model_needs_the_smallest_number_of_steps_from_which_on_no_run_is_damaged(made):
    for name, runs in models(made).values():
        depth = int(name.split()[1])
        assert needed(runs) == min(t for t in runs if t >= needs_of(depth))


@pytest.mark.parametrize(
    ("damaged_at", "least"), [((), 16.0), ((16.0,), 22.0), ((16.0, 32.0), 45.0), ((16.0, 90.0), 22.0)]
)
def test_too_many_steps_say_nothing_of_too_few(damaged_at, least):
    runs = {t: [4.0 + 0.001 * abs(t - 64), 4.0 + (t in damaged_at)] for t in (16.0, 22.0, 32.0, 45.0, 64.0, 90.0)}
    assert needed(runs) == least


def test_the_report_has_a_line_per_model_and_the_claim_holds_where_70_steps_are_enough(made):
    text = report(made)
    assert text.count("| Llama, ") == 5
    assert "| GPT, 4 x 128 " in text
    (claim,) = claims(made)
    assert claim.verdict == "holds"
    late = [row | {"loss": 9.0} if row["ramp_steps"] < 90 and row["depth"] == 16 else row for row in made]
    assert [claim.verdict for claim in claims(late)] == ["does not hold"]
    assert len(plot(made).axes[0].get_lines()) > 6
