"""The coherence of a model's movement: closed forms, and which matrices are looked at."""

import json
import math

import pytest
import torch
from torch import nn

from hf_warmup import movement
from hf_warmup.movement import MatrixMovement, coherence, inner_matrices


def made_of(shares, rows=40, columns=50):
    """A matrix with these singular values, along random directions."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(shares), generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return left * torch.tensor(shares, dtype=torch.float64) @ right.T


def test_the_coherence_of_one_direction_is_one_and_of_k_equal_ones_a_root():
    assert coherence([made_of([3.0])]) == pytest.approx(1.0)
    for k in (2, 5, 40):
        assert coherence([made_of([1e-3] * k)]) == pytest.approx(1 / math.sqrt(k))
    assert coherence([made_of([4.0, 3.0])]) == pytest.approx(0.8)


def test_the_median_is_over_the_matrices_that_have_moved():
    moved = [made_of([1.0] * k) for k in (1, 4, 9)]
    assert coherence([*moved, torch.zeros(3, 3)]) == pytest.approx(1 / 2)
    assert math.isnan(coherence([torch.zeros(3, 3)]))
    assert math.isnan(coherence([]))
    for bad in (math.nan, math.inf):
        assert math.isnan(coherence([torch.full((2, 2), bad), *moved]))


class Layers(nn.Module):
    def __init__(self, num):
        super().__init__()
        self.words = nn.Embedding(9, 40)
        self.inner = nn.ModuleList(nn.Linear(40, 40) for _ in range(num))
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 9, bias=False)
        self.head.weight = self.words.weight


def test_matrices_are_at_even_distances_and_no_embedding_is_among_them():
    for num, kept in ((3, []), (4, [0, 1, 2, 3]), (16, range(16)), (31, range(0, 31, 2)), (46, range(0, 46, 3))):
        model = Layers(num)
        found, expected = inner_matrices(model), [model.inner[i].weight for i in kept]
        assert len(found) == len(expected)
        assert all(p is q for p, q in zip(found, expected, strict=True))


def test_a_matrix_that_is_not_trained_is_not_looked_at():
    model = Layers(5)
    model.inner[0].weight.requires_grad_(False)
    assert [id(p) for p in inner_matrices(model)] == [id(layer.weight) for layer in model.inner[1:]]
    model.inner.requires_grad_(False)
    assert MatrixMovement(model).where() == []


def test_a_block_has_the_first_rows_and_columns_and_its_movement_is_counted_from_the_numbers_kept():
    model = Layers(4)
    blocks = MatrixMovement(model)
    starts = json.loads(json.dumps(blocks.where()))
    assert starts == [layer.weight[:32, :32].flatten().tolist() for layer in model.inner]
    assert math.isnan(blocks.coherence(starts))
    with torch.no_grad():
        for layer, k in zip(model.inner, (1, 4, 4, 9), strict=True):
            layer.weight[:32, :32] += made_of([1.0] * k, 32, 32).float()
            layer.weight[32:] += 7.0
    assert blocks.coherence(starts) == pytest.approx(1 / 2, rel=1e-5)
    assert [p.grad for p in model.parameters()] == [None] * len(list(model.parameters()))


def test_numbers_of_another_model_are_refused():
    with pytest.raises(ValueError, match="starts must be of the 5 blocks of this model, got 4 of others"):
        MatrixMovement(Layers(5)).coherence(MatrixMovement(Layers(4)).where())


def test_a_model_kept_in_half_precision_has_numbers_too():
    model = Layers(4).bfloat16()
    blocks = MatrixMovement(model)
    starts = blocks.where()
    with torch.no_grad():
        for layer in model.inner:
            layer.weight.add_(1.0)
    assert blocks.coherence(starts) > 0.99


def test_the_values_may_be_gathered_by_whoever_has_them():
    model, asked = Layers(4), []

    def values(p):
        asked.append(p)
        return movement.whole(p) + 1

    assert MatrixMovement(model, values).where()[0][0] == pytest.approx(model.inner[0].weight[0, 0].item() + 1)
    assert len(asked) == 4
