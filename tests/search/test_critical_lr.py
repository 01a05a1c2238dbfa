import dataclasses
import math

import pytest
import torch

from hf_warmup import find_critical_lr

GUESSES = pytest.mark.parametrize("guess", [1e-6, 0.04, 1e6], ids=["far below", "near", "far above"])


METHODS = pytest.mark.parametrize("method", ["secant", "paper"])


def quadratic(hessian, update=None, offset=0.0):
    """Loss ½ θᵀHθ + offset at θ = 1 and the loss after a step along `update` (the gradient), in float64."""
    theta = torch.ones(len(hessian), dtype=torch.float64)
    gradient = hessian @ theta
    update = gradient if update is None else update
    loss_at = lambda lr: (0.5 * (theta - lr * update) @ hessian @ (theta - lr * update)).item() + offset  # noqa: E731
    return loss_at, (2 * gradient @ update / (update @ hessian @ update)).item()


@GUESSES
@METHODS
def test_isotropic_quadratic_gives_two_over_sharpness(guess, method):
    loss_at, critical = quadratic(40.0 * torch.eye(3, dtype=torch.float64))
    assert critical == pytest.approx(2 / 40)

    found = find_critical_lr(loss_at, guess=guess, method=method, delta=1e-9, rtol=1e-6, max_evals=100)

    assert found.status == "found"
    assert found.lower <= critical <= found.upper
    assert found.value == pytest.approx(critical, rel=1e-6)


@GUESSES
def test_the_bracket_is_true_and_its_upper_end_within_delta(guess):
    # Twice the curvature in one direction, and a constant so that δ has something to be relative to.
    update = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    loss_at, critical = quadratic(torch.diag(torch.tensor([5.0, 50.0, 10.0], dtype=torch.float64)), update, offset=3.0)

    found = find_critical_lr(loss_at, guess=guess, method="paper", max_evals=60)

    assert found.lower <= critical <= found.upper
    assert loss_at(found.lower) <= loss_at(0.0) < loss_at(found.upper) <= 1.1 * loss_at(0.0)
    assert found.num_evals <= abs(math.log2(critical / guess)) + 2 + 10
    assert all(loss == loss_at(lr) for lr, loss in found.evals)
    assert found.evals[0] == (0.0, loss_at(0.0))


def printed_algorithms(loss_at, eta, target, delta):
    """Algorithms 1 and 2 as printed, for a loss that does not rise at the first η; stops at η_trgt itself."""
    start = loss_at(0.0)
    while loss_at(eta) < start:
        if eta >= target:
            return target
        eta = min(2 * eta, target)
    lower, upper = eta / 2, eta
    while loss_at(upper) > start * (1 + delta):
        middle = (lower + upper) / 2
        if loss_at(middle) < start:
            lower = middle
        else:
            upper = middle
    return upper


@pytest.mark.parametrize("guess", [1e-4, 3e-4, 7e-3])
@pytest.mark.parametrize("delta", [0.1, 0.01])
def test_agrees_with_the_algorithms_as_printed(guess, delta):
    loss_at, _ = quadratic(torch.diag(torch.tensor([1.0, 7.0, 20.0], dtype=torch.float64)), offset=1.0)
    found = find_critical_lr(loss_at, guess=guess, target=64 * guess * 16, delta=delta, method="paper")
    assert found.value == printed_algorithms(loss_at, guess, 64 * guess * 16, delta)


def test_starts_at_1e_minus_4_or_at_the_target():
    loss_at, _ = quadratic(torch.eye(2, dtype=torch.float64))
    for method, first in [("secant", 1.0), ("paper", 1e-4)]:
        assert find_critical_lr(loss_at, method=method).evals[1][0] == 1e-4
        assert find_critical_lr(loss_at, target=1e-5, method=method).evals[1][0] == 1e-5
        assert find_critical_lr(loss_at, target=1.0, method=method).evals[1][0] == first


@METHODS
def test_no_rise_up_to_the_target_ends_there(method):
    loss_at, critical = quadratic(torch.eye(2, dtype=torch.float64))
    found = find_critical_lr(loss_at, guess=1.0, target=1.9, method=method)
    assert (found.status, found.value, found.lower, found.upper) == ("above_target", 1.9, 1.9, math.inf)
    assert critical == pytest.approx(2.0)
    assert find_critical_lr(loss_at, guess=1.0, target=2.1, method=method).status == "found"
    assert find_critical_lr(loss_at, guess=5.0, target=1.9, method=method).num_evals == 2


@METHODS
@pytest.mark.parametrize("target", [None, 1.0])
def test_a_known_loss_before_the_step_saves_an_evaluation_and_changes_nothing_else(method, target):
    loss_at, _ = quadratic(torch.diag(torch.tensor([5.0, 50.0, 10.0], dtype=torch.float64)))
    tried = []

    def counted(lr):
        tried.append(lr)
        return loss_at(lr)

    measured = find_critical_lr(loss_at, guess=1e-3, target=target, method=method)
    found = find_critical_lr(counted, guess=1e-3, target=target, method=method, start=loss_at(0.0))
    assert dataclasses.replace(found, start_given=False) == measured
    assert len(tried) == found.num_evals == measured.num_evals - 1
    assert 0.0 not in tried


def test_a_known_loss_that_is_not_finite_ends_the_search_without_an_evaluation():
    found = find_critical_lr(lambda lr: 1.0, start=math.nan)
    assert (found.status, found.num_evals) == ("nonfinite", 0)


@METHODS
def test_any_loss_that_is_not_finite_has_risen(method):
    for bad in (math.nan, math.inf, -math.inf):
        cliff = lambda lr, bad=bad: 1.0 - lr if lr < 0.3 else bad  # noqa: E731
        found = find_critical_lr(cliff, guess=1e-3, method=method, max_evals=60)
        # A cliff: no η above it has a loss within δ, so the answer is the last safe one.
        assert found.status == "found"
        assert found.value == found.lower < 0.3 <= found.upper
        assert found.value == pytest.approx(0.3, rel=1 / 256 if method == "paper" else 1 / 16)


def test_a_finite_cliff_ends_at_the_safe_end():
    found = find_critical_lr(lambda lr: 1.0 - lr if lr < 0.3 else 50.0, guess=1e-3, method="paper", max_evals=60)
    assert found.status == "found"
    assert found.value == found.lower < 0.3 <= found.upper


@METHODS
@pytest.mark.parametrize("loss_at", [lambda lr: 2.0, lambda lr: -lr], ids=["zero update", "falls for ever"])
def test_a_loss_that_never_rises_says_so(loss_at, method):
    found = find_critical_lr(loss_at, method=method)
    assert (found.status, found.value, found.upper) == ("never_rises", math.inf, math.inf)
    assert found.num_evals == 40


@pytest.mark.parametrize("guess", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@METHODS
def test_an_uphill_update_is_not_a_descent(guess, dtype, method):
    def loss_at(lr):
        return torch.tensor(1.0, dtype=dtype).add(lr).item()

    found = find_critical_lr(loss_at, guess=guess, method=method, max_evals=60)
    assert (found.status, found.value) == ("not_descent", 0.0)


@pytest.mark.parametrize("factor", [1 - 1e-9, 1 + 1e-9, 2 * (1 + 1e-9), 4 * (1 + 1e-9), 64 * (1 + 1e-9)])
@METHODS
def test_a_guess_a_hair_beside_critical_is_no_uphill(factor, method):
    loss_at, critical = quadratic(torch.eye(2, dtype=torch.float64))
    found = find_critical_lr(loss_at, guess=critical * factor, method=method)
    assert found.status == "found"
    assert found.lower <= critical <= found.upper


def test_a_known_slope_that_does_not_descend_needs_no_trial():
    found = find_critical_lr(lambda lr: 1.0 + lr, slope=-1.0)
    assert (found.status, found.num_evals) == ("not_descent", 1)


@pytest.mark.parametrize("start", [math.nan, math.inf, -math.inf])
def test_a_start_that_is_not_finite_ends_the_search(start):
    found = find_critical_lr(lambda lr: start)
    assert found.status == "nonfinite"
    assert math.isnan(found.value)
    assert found.num_evals == 1


@METHODS
def test_ties_on_the_way_up_are_not_rises(method):
    # A loss in bfloat16 does not move for small η.
    def loss_at(lr):
        return torch.tensor(4.0 - 3 * lr + lr**2).bfloat16().item()

    found = find_critical_lr(loss_at, guess=1e-6, method=method)
    assert found.status == "found"
    assert found.lower <= 3.1
    assert found.upper >= 3


@pytest.mark.parametrize(("guess", "target"), [(1e-4, 1.0), (1e6, None), (3e-2, None)])
@METHODS
def test_a_spent_budget_says_so_and_claims_nothing(guess, target, method):
    loss_at, _ = quadratic(40.0 * torch.eye(3, dtype=torch.float64))
    found = find_critical_lr(loss_at, guess=guess, target=target, method=method, max_evals=4, delta=1e-9, rtol=1e-3)
    assert (found.status, found.num_evals) == ("budget_spent", 4)
    assert found.value == found.lower


@pytest.mark.parametrize("loss", [0.0, -5.0])
@METHODS
def test_losses_at_or_below_zero_work(loss, method):
    loss_at, critical = quadratic(torch.eye(2, dtype=torch.float64), offset=loss - 1.0)
    assert loss_at(0.0) == loss
    found = find_critical_lr(loss_at, method=method, max_evals=100)
    assert found.status == "found"
    assert found.lower <= critical <= found.upper


@pytest.mark.parametrize("guess", [0.01, 0.1, 0.5, 20, 100, 1e4, 1e6])
def test_three_evaluations_are_enough_on_a_parabola_of_known_slope(guess):
    hessian = torch.diag(torch.tensor([5.0, 50.0, 10.0], dtype=torch.float64))
    loss_at, critical = quadratic(hessian, offset=3.0)
    gradient = hessian.sum(0)
    found = find_critical_lr(loss_at, guess=guess * critical, slope=(gradient @ gradient).item())
    assert (found.status, found.num_evals) == ("found", 3)
    assert found.value == pytest.approx(critical, rel=1e-6)
    assert found.lower < critical < found.upper <= found.lower * (1 + 1 / 16) * (1 + 1e-9)
    assert loss_at(found.lower) <= loss_at(0.0) < loss_at(found.upper)


def curve(seed):
    """A loss that falls from L(0) > 0, wiggles, and rises for good: a random polynomial in a random power of η."""
    generator = torch.Generator().manual_seed(seed)
    power, scale, wiggle, phase = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    power, scale = 0.3 + 2 * power, 10 ** (6 * scale - 3)

    def loss_at(lr):
        t = (lr / scale) ** power
        return 5 - 2 * t + t**2 + wiggle * t * math.sin(3 * t + phase)

    return loss_at, scale


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e2])
def test_on_any_curve_the_bracket_is_true_and_narrow(seed, factor):
    loss_at, scale = curve(seed)
    found = find_critical_lr(loss_at, guess=factor * scale)
    assert found.status == "found"
    assert loss_at(found.lower) <= loss_at(0.0) < loss_at(found.upper)
    assert found.lower < found.value <= found.upper <= found.lower * (1 + 1 / 16) * (1 + 1e-9)
    # No trial knew of an earlier crossing.
    assert all(loss <= loss_at(0.0) for lr, loss in found.evals if lr <= found.lower)


def test_a_wrong_slope_costs_evaluations_but_not_the_truth():
    loss_at, critical = quadratic(40.0 * torch.eye(3, dtype=torch.float64), offset=1.0)
    for factor in (1e-3, 0.1, 10, 1e3):
        found = find_critical_lr(loss_at, guess=1e-3, slope=factor * 4800.0)
        assert found.lower <= critical <= found.upper <= found.lower * 1.07


def test_a_rise_within_rounding_is_no_rise():
    # One unit in the last place up at small η, as a sum in another order may give.
    ulp = 2.0**-22

    def loss_at(lr):
        return 4.0 - 3 * lr + lr**2 if lr > 1e-3 else 4.0 + ulp * (lr > 0)

    found = find_critical_lr(loss_at, guess=1e-5)
    assert found.status == "found"
    assert found.lower <= 3 < found.upper


def test_a_plateau_that_ends_in_a_rise_is_not_a_descent():
    found = find_critical_lr(lambda lr: 1.0 if lr < 0.5 else 2.0, guess=1e-2)
    assert (found.status, found.value) == ("not_descent", 0.0)


@pytest.mark.parametrize(
    "bad",
    [{"guess": 0.0}, {"guess": math.inf}, {"target": -1.0}, {"rtol": 0.0}, {"delta": math.nan}],
)
def test_bad_arguments_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got"):
        find_critical_lr(lambda lr: 1.0, **bad)


def test_a_bracket_narrower_than_logarithms_of_floats_tell_is_refused():
    with pytest.raises(ValueError, match="rtol must be at least 1e-12, .*, got 1.2e-15"):
        find_critical_lr(lambda lr: (1 - lr / 1e-7) ** 2, guess=2.04e-9, rtol=1.2e-15)


def test_bad_method_and_budget_are_named():
    with pytest.raises(ValueError, match="method must be .* got 'newton'"):
        find_critical_lr(lambda lr: 1.0, method="newton")
    with pytest.raises(ValueError, match="max_evals must be at least 2, got 1"):
        find_critical_lr(lambda lr: 1.0, max_evals=1)
