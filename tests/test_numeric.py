"""What the public functions take for a number, and that they say in a line what they do not."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_warmup import GIAdamW, GuidedWarmup, LinearWarmup, PersistentCatapult, WarmupSchedule, find_critical_lr
from hf_warmup.numeric import boolean, number, whole
from hf_warmup.sharpness import critical_sharpness, diagnose, sharpness, stability_threshold


@pytest.mark.parametrize(
    "value", [0.5, np.float64(0.5), np.float16(0.5), Decimal("0.5"), Fraction(1, 2), torch.tensor(0.5)]
)
def test_a_number_is_a_float(value):
    assert number("x", value) == 0.5
    assert type(number("x", value)) is float


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_whole_number_is_an_int(value):
    assert whole("x", value) == 3
    assert type(whole("x", value)) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True)])
def test_a_boolean_is_one_and_no_number(value):
    assert boolean("x", value) is True
    for check in (number, whole):
        with pytest.raises(ValueError, match="x must be a .*number, got "):
            check("x", value)


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def schedule():
    return LambdaLR(torch.optim.SGD([parameter()], lr=1.0), lambda t: 1.0)


def search(loss_at=lambda lr: (lr - 1) ** 2, **options):
    return lambda: find_critical_lr(loss_at, **options)


NUMBERS = ["x", None, [1.0], True, 10**400, np.array([1.0])]
WRONG = {
    "rtol": [search(rtol=v) for v in [*NUMBERS, 0.0, -1.0, math.nan, math.inf, 1e-320]],
    "delta": [
        *(search(delta=v) for v in [*NUMBERS, 0.0, math.nan]),
        *(lambda v=v: PersistentCatapult(9, 1.0, delta=v) for v in [*NUMBERS, 0, math.nan]),
    ],
    "guess": [search(guess=v) for v in ["x", [1.0], True, 10**400, 0.0, math.nan, math.inf]],
    "target": [search(target=v) for v in ["x", [1.0], True, 10**400, 0.0, math.nan, math.inf]],
    "slope": [search(slope=v) for v in ["x", [1.0], True, math.nan]],
    "start": [search(start=v) for v in ["x", [1.0], True]],
    "max_evals": [search(max_evals=v) for v in ["x", None, [9], True, 1, 9.0, math.nan, 10**400]],
    "method": [search(method=v) for v in ["x", None, [1], np.array([1, 2])]],
    "the loss of loss_at": [
        search(lambda lr: None),
        search(lambda lr: "x"),
        search(lambda lr: [1.0]),
        search(lambda lr: torch.ones(2)),
    ],
    "num_training_steps": [
        *(lambda v=v: GuidedWarmup(v) for v in [*NUMBERS, 0, -1, 0.5, math.nan, math.inf]),
        *(lambda v=v: GuidedWarmup.usual_ramp_steps(v) for v in [*NUMBERS, 0, -1, math.nan]),
        *(lambda v=v: PersistentCatapult(v, 1.0) for v in [*NUMBERS, 0, -1, math.nan, math.inf]),
        *(lambda v=v: LinearWarmup(v, 1.0, 1) for v in [*NUMBERS, 0, -1, math.nan, math.inf]),
        *(lambda v=v: WarmupSchedule(schedule(), v) for v in [*NUMBERS, 0, -1, math.nan, math.inf]),
    ],
    "num_steps": [lambda v=v: WarmupSchedule(schedule(), 9).skip(v) for v in [*NUMBERS, -1, 10, math.nan]],
    "warmup_steps": [
        *(lambda v=v: WarmupSchedule(schedule(), 9, v) for v in [*NUMBERS, -1, 10, math.nan]),
        *(lambda v=v: LinearWarmup(9, 1.0, v) for v in [*NUMBERS, 0, -1, 10, math.nan]),
    ],
    "ramp_steps": [lambda v=v: GuidedWarmup(9, ramp_steps=v) for v in ["x", [1.0], True, 0, math.nan, math.inf]],
    "num_weights": [
        lambda v=v: GuidedWarmup.usual_ramp_steps(9, optimizer="Muon", num_weights=v)
        for v in [*NUMBERS, "AdamW", -1, 2.5, math.nan]
    ],
    "decoder": [
        *(lambda v=v: GuidedWarmup(9, decoder=v) for v in ["x", None, 1, [True]]),
        *(lambda v=v: GuidedWarmup.usual_ramp_steps(9, decoder=v) for v in ["x", None, 1, [True]]),
    ],
    "learning_rate": [
        *(lambda v=v: GuidedWarmup(9, v) for v in ["x", [1.0], True, 10**400, 0, math.nan, math.inf]),
        *(lambda v=v: PersistentCatapult(9, v) for v in [*NUMBERS, 0, math.nan]),
        *(lambda v=v: LinearWarmup(9, v, 3) for v in [*NUMBERS, 0, math.nan]),
    ],
    "target_lr": [
        lambda v=v: diagnose(torch.optim.SGD([parameter()]), [lambda: None], v) for v in [*NUMBERS, 0, math.nan]
    ],
    "init_lr": [
        *(lambda v=v: PersistentCatapult(9, 1.0, init_lr=v) for v in [*NUMBERS, 0]),
        *(lambda v=v: LinearWarmup(9, 1.0, 3, init_lr=v) for v in [*NUMBERS, 0, 2, math.nan]),
    ],
    "v0": [lambda v=v: GIAdamW([parameter()], v0=v) for v in [*NUMBERS, 0, math.nan, math.inf]],
    "max_hvps": [lambda v=v: sharpness(lambda: None, [parameter()], max_hvps=v) for v in [*NUMBERS, 1.5]],
    "tol": [lambda v=v: sharpness(lambda: None, [parameter()], tol=v) for v in NUMBERS],
    "previous": [lambda v=v: critical_sharpness(lambda lr: lr, previous=v) for v in ["x", [1.0], True]],
    "optimizer": [
        *(lambda v=v: stability_threshold(v) for v in ["x", None, 3, torch.nn.Linear(1, 1)]),
        *(lambda v=v: diagnose(v, [lambda: None], 1.0) for v in ["x", None, 3, torch.nn.Linear(1, 1)]),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_number_is_refused_in_one_line_that_names_it(name):
    for call in WRONG[name]:
        with pytest.raises(ValueError, match=rf"^{name} ?(must|.* must)") as error:
            call()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_a_search_takes_numbers_of_other_libraries():
    plain = find_critical_lr(lambda lr: (lr - 1) ** 2, guess=0.5, target=4.0, rtol=0.125)
    given = {"guess": torch.tensor(0.5), "target": np.float64(4), "rtol": Fraction(1, 8), "max_evals": np.int64(40)}
    assert find_critical_lr(lambda lr: torch.tensor((lr - 1) ** 2, dtype=torch.float64), **given) == plain
