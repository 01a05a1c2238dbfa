import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from peer_optimizers import AdaS, knowledge_gain, low_rank
from warmup_cases import CNN, train


def free_energy(s, small, large, variance):
    """Element by element."""
    alpha = small / large
    t = 2.5129 * alpha**0.5
    total, b = 0.0, (1 + t) * (1 + alpha / t)
    for value in s:
        x = value**2 / (large * variance)
        total += x - math.log(x)
        if x > b:
            tau = 0.5 * (x - 1 - alpha + math.sqrt((x - 1 - alpha) ** 2 - 4 * alpha))
            total += math.log(tau + 1) + alpha * math.log(tau / alpha + 1) - tau
    return total, b


def written_out(matrix):
    """The variance by trying ever closer ones between the bounds, and the values that are kept."""
    small, large = sorted(matrix.shape)
    s = torch.linalg.svdvals(matrix).tolist()
    _, b = free_energy(s, small, large, 1.0)
    rank = min(math.ceil(small / (1 + small / large)) - 1, small - 1)
    rest = [v**2 for v in s[rank:]]
    low, high = max(rest[0] / (large * b), sum(rest) / len(rest) / large), sum(v**2 for v in s) / (small * large)
    for _ in range(12):
        tried = [low + (high - low) * i / 100 for i in range(101)]
        best = min(range(101), key=lambda i: free_energy(s, small, large, tried[i])[0])
        low, high = tried[max(0, best - 1)], tried[min(100, best + 1)]
    variance, kept = (low + high) / 2, []
    for v in s:
        if v**2 > large * variance * b:
            r = 1 - (small + large) * variance / v**2
            kept.append(v / 2 * (r + math.sqrt(r**2 - 4 * small * large * variance**2 / v**4)))
    return kept


def planted(seed, rank, shape=(20, 60), noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return noise * draw(*shape) + (3 * draw(shape[0], rank) @ draw(rank, shape[1]) if rank else 0)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (30, 30)])
def test_variational_bayes_keeps_what_was_planted_in_noise_as_written_out(rank, shape):
    for seed in range(3):
        found = low_rank(planted(seed, rank, shape))
        assert len(found) == rank
        # A least is flat: σ² is known to the root of the precision.
        assert found.tolist() == pytest.approx(written_out(planted(seed, rank, shape)), rel=1e-7)


def test_matrices_without_noise_or_rows_are_no_trouble():
    assert len(low_rank(torch.zeros(4, 9))) == 0
    assert len(low_rank(torch.ones(1, 9))) == 0
    assert low_rank(planted(0, 2, noise=0.0)).tolist() == pytest.approx(
        torch.linalg.svdvals(planted(0, 2, noise=0.0))[:2].tolist(), rel=1e-3
    )


def test_the_knowledge_gain_is_the_mean_over_both_kinds_of_channels():
    weight = planted(0, 3, (16, 8 * 9)).reshape(16, 8, 3, 3)
    expected = []
    for matrix in (weight.permute(1, 0, 2, 3).reshape(8, 16 * 9), weight.reshape(16, 8 * 9)):
        kept = written_out(matrix)
        expected.append(sum(kept) / (len(matrix) * kept[0]) if kept else 0.0)
    assert expected[1] > 0.1
    assert knowledge_gain(weight) == pytest.approx(sum(expected) / 2, rel=1e-7)


def test_adas_steps_as_written_out():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(4, 2)).double()
    params = list(model.parameters())
    with torch.no_grad():
        params[0].copy_(planted(0, 3, (16, 72)).reshape(16, 8, 3, 3))
    optimizer = AdaS(params, 2, lr=0.05, beta=0.8)
    values, buffers, rate, gain = [p.detach().clone() for p in params], [0.0] * len(params), 0.05, None
    for t in range(1, 9):
        for group in optimizer.param_groups:
            group["lr"] = 0.5  # the caller's factor
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=torch.float64)
            buffers[i] = 0.9 * buffers[i] + p.grad
            values[i] = values[i] - 0.5 * rate * buffers[i]
        optimizer.step()
        for p, value in zip(params, values, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-10, atol=1e-14)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5] * len(params)
        if t % 2 == 0:
            now = knowledge_gain(params[0])
            rate = 0.05 if gain is None else max(0.8 * rate + now - gain, 1e-10)
            gain = now
            assert optimizer.rates == pytest.approx([rate] * len(params), rel=1e-10)
    assert rate != 0.05


def test_adas_waits_while_there_is_no_gain():
    conv = nn.Conv2d(8, 16, 3, bias=False)
    optimizer = AdaS(conv.parameters(), 1, lr=0.05)
    assert knowledge_gain(conv.weight) == 0
    for _ in range(3):
        conv.weight.grad = torch.zeros_like(conv.weight)
        optimizer.step()
        assert optimizer.rates == [0.05]
    with torch.no_grad():
        conv.weight.copy_(planted(0, 3, (16, 72)).reshape(16, 8, 3, 3))
    optimizer.step()
    assert optimizer.rates == [pytest.approx(0.8 * 0.05 + knowledge_gain(conv.weight), rel=1e-10)]


def test_adas_trains_the_cnn():
    made = train(replace(CNN, steps=60, width=32), "AdaS", lambda step, loss_at: 1.0, 0)
    assert made["loss"] < made["first"]
