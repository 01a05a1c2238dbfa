"""What the study of LoRA's learning rate makes of its runs."""

import math

import pytest

import reporting
from grid import lines
from lora_study import NAME, Job, Place, best_of, carried, places, report


def test_the_best_learning_rate_is_the_bottom_of_a_parabola_in_its_logarithm():
    losses = {1e-3 * 2**k: 2 + (k - 2.3) ** 2 for k in range(5)}
    assert best_of(losses) == pytest.approx(1e-3 * 2**2.3, rel=1e-12)
    assert best_of({1e-3 * 2**k: float(k) for k in range(5)}) == 1e-3  # at the edge of the grid


def test_a_place_has_the_mean_loss_and_the_critical_learning_rate_of_all_seeds():
    made = [
        {"model": "m", "task": "t", "rank": "8", "lr": str(lr), "seed": str(seed), "loss": str(loss + seed)}
        | {"critical_lr": str(2.0**seed) if lr == 1.0 else ""}
        for seed in (1, 3)
        for lr, loss in ((1.0, 1.0), (2.0, 0.0), (4.0, 1.0))
    ]
    assert places(made) == [Place("m", "t", 8, 2.0, pytest.approx(4.0), 2.0, False)]


def test_what_is_carried_over_exactly_is_off_by_a_factor_of_one():
    full, lora = Place("m", "t", 0, 1e-3, 0.1, 1.0, False), Place("m", "t", 8, 4e-3, 0.4, 1.0, False)
    line = carried([full, lora], 10, same=("model", "task"), change=lambda a, b: not a.rank and b.rank)
    assert line == {"pairs": "1", "by η_c": "1.00, 1.00; 100%", "by the rule": "2.50, 2.50; 0%"}
    assert math.isclose(10 * full.best / lora.best, 2.5)


def test_the_committed_page_is_that_of_the_committed_runs():
    made = list(lines(reporting.RESULTS, NAME, Job._fields).values())
    assert (reporting.RESULTS / f"{NAME}.md").read_text() == report(made)
