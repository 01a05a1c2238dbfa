import threading
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import hf_warmup.sharpness.lanczos
from hf_warmup.sharpness.lanczos import largest_eigenpair


def symmetric(values, seed=0):
    """A matrix with these eigenvalues, in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def solve(matrix, tol=1e-3, max_products=100):
    start = torch.randn(len(matrix), dtype=matrix.dtype, generator=torch.Generator().manual_seed(1))
    return largest_eigenpair(lambda v: matrix @ v, start, tol=tol, max_products=max_products)


# The largest in magnitude is at the wrong end, and the wanted ones are close to others.
SPECTRUM = [*torch.linspace(-9.0, 6.0, 97).tolist(), 7.0, 7.5, 9.0]


@pytest.mark.parametrize(
    "values", [SPECTRUM, [-v for v in SPECTRUM], [5.0, 5.0, 1.0, -7.0], [0.0] * 50, [-1.0] * 50, [3.0, -4.0], [2.0]]
)
def test_finds_the_algebraically_largest_eigenvalue_of_a_known_matrix(values):
    matrix = symmetric(values)
    found = solve(matrix, tol=1e-10, max_products=1000)

    assert found.converged
    assert found.value == pytest.approx(max(values), rel=1e-12, abs=1e-12)
    assert (matrix @ found.vector).allclose(max(values) * found.vector, rtol=0, atol=2e-9)
    assert float(found.vector.norm()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("max_products", [3, 7, 8, 9, 20, 40])
def test_residuals_are_true_also_of_what_has_not_converged(max_products):
    matrix = symmetric(SPECTRUM)
    found = solve(matrix, tol=1e-14, max_products=max_products)
    assert not found.converged
    assert found.num_products == max_products
    true = float((matrix @ found.vector - found.value * found.vector).norm())
    assert found.residual == pytest.approx(true, rel=1e-6)
    assert min(abs(found.value - known) for known in SPECTRUM) <= found.residual


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_ends_as_soon_as_the_residual_is_small_enough(tol):
    matrix = symmetric(SPECTRUM)
    found = solve(matrix, tol=tol)
    earlier = solve(matrix, tol=tol, max_products=found.num_products - 1)
    assert found.converged
    assert found.residual <= tol * 9 < earlier.residual
    assert not earlier.converged


@pytest.mark.parametrize("skew", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("max_products", [3, 40], ids=["one basis", "restarted"])
def test_a_matrix_that_is_not_symmetric_is_told(skew, max_products):
    """Of A = S + K, K antisymmetric and of norm 9 skew, xᵀA y - yᵀA x is 2 xᵀK y; S has the norm 9."""
    k = torch.randn(100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    k = (k - k.T) * 9 / torch.linalg.matrix_norm(k - k.T, 2)
    found = solve(symmetric(SPECTRUM) + skew * k, tol=1e-14, max_products=max_products)
    assert 0.05 * skew <= found.asymmetry <= 2.5 * skew + 1e-14


@pytest.mark.parametrize("largest", [0.0, 1e-9], ids=["zero", "next to zero"])
def test_an_eigenvalue_near_zero_is_good_enough_to_the_rounding_of_the_others(largest):
    diagonal = torch.cat([torch.linspace(-8.0, -1.0, 20), torch.tensor([largest])])
    found = solve(torch.diag(diagonal), tol=1e-3)
    assert found.converged
    assert abs(found.value - largest) <= found.residual + 128 * 8 * 2**-23


def test_sums_over_single_precision_vectors_lose_nothing():
    # Sums over so many elements in single precision would lose 3e-7.
    num = 2**20 + 3
    diagonal = torch.linspace(0.0, 1.0, num)
    diagonal[7] = 1.5
    spread = torch.full((num,), num**-0.5)
    # The spread direction makes every element count: the eigenvalue is the root of a secular equation.
    found = largest_eigenpair(
        lambda v: diagonal * v + 2 * spread * (spread.double() @ v.double()).float(),
        spread.clone(),
        tol=1e-5,
        max_products=100,
    )
    wide, d = spread.double().square(), diagonal.double()
    low, high = 1.6, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        # det = 0: 1 = 2 Σ s_i² / (λ - d_i), decreasing in λ
        low, high = (middle, high) if 2 * float((wide / (middle - d)).sum()) > 1 else (low, middle)
    assert found.converged
    assert found.value == pytest.approx(low, rel=3e-8)


def test_vectors_split_over_processes_give_what_whole_ones_give():
    matrix, cut = symmetric(SPECTRUM), 30  # threads stand in for the processes
    start = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    barrier, parts, found = threading.Barrier(2, timeout=300), [None, None], [None, None]

    def exchange(rank, value):
        parts[rank] = value
        barrier.wait()
        both = list(parts)
        barrier.wait()
        return both

    def process(rank):
        rows = slice(0, cut) if rank == 0 else slice(cut, None)
        found[rank] = largest_eigenpair(
            lambda v: (matrix @ torch.cat(exchange(rank, v.clone())))[rows],
            start[rows],
            tol=1e-10,
            max_products=100,
            reduce_dots=lambda dots: sum(exchange(rank, dots.clone())),
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = solve(matrix, tol=1e-10)
    assert found[0].value == found[1].value == pytest.approx(whole.value, rel=1e-12)
    assert found[0].num_products == found[1].num_products == whole.num_products
    assert abs(float(torch.cat([part.vector for part in found]) @ whole.vector)) == pytest.approx(1)


def test_holds_eight_vectors_and_two_more(monkeypatch):
    monkeypatch.setattr(hf_warmup.sharpness.lanczos, "_CHUNK", 2**12)
    diagonal, start = torch.linspace(0.0, 1.0, 200_000), torch.randn(200_000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        largest_eigenpair(diagonal.mul, start, max_products=30, tol=1e-6)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    chunk = 8 * 8 * 2**12  # of the basis, in double precision, before and after its rotation
    assert 9 * start.nbytes < max(held) < 10 * start.nbytes + 2.1 * chunk
    assert held[-1] <= start.nbytes  # the answer


def test_a_product_that_is_not_finite_ends_it():
    found = largest_eigenpair(lambda v: v * float("nan"), torch.ones(5), tol=1e-3, max_products=100)
    assert str(found.value) == str(found.residual) == "nan"
    assert (found.converged, found.num_products) == (False, 1)


def test_a_start_of_zero_is_refused():
    with pytest.raises(ValueError, match="start must not be zero"):
        largest_eigenpair(lambda v: v, torch.zeros(3), tol=1e-3, max_products=100)
