"""The largest eigenvalues of a symmetric matrix that is only known by its products with vectors.

Lanczos with full reorthogonalisation and thick restarts [1]. From q_1 a basis of the Krylov space is built, whose
next member is what A q_j has outside the basis Q = (q_1 ... q_j):

    h = Qᵀ A q_j,    w = A q_j - Q h,    β = ‖w‖,    q_{j+1} = w / β.

The columns h make the projected matrix T = Qᵀ A Q. An eigenpair (θ, s) of T is an estimate θ, Q s of one of A, and

    ‖A Q s - θ Q s‖ = β |s_j|

its residual: some eigenvalue of A lies within it of θ. When the basis is full, its best estimates and w start the
next.

Why not a solver that exists: `torch.lobpcg` wants the matrix itself. ARPACK (`scipy.sparse.linalg.eigsh`) works in
numpy, sees one process's part only, and looks whether it has converged after 20 products, also from a vector that
was right. Power iteration (PyHessian) finds the eigenvalue of the largest magnitude, which may be the negative one.

Vectors are flat, in single precision (double if A is), on any device, and may be split over processes: then
`reduce_dots` adds up. Sums over them and T are in double precision, so a single precision A limits the result, not
the solver. Memory: `num_vectors` + 1 vectors, and what a product takes.

[1] Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
    Appl. 22 (2000).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of each vector that are in double precision at a time: 17 MB with a basis of 8.
_CHUNK = 2**18
# Times the largest eigenvalue in magnitude: what rounding leaves of a product that should be inside the basis.
_ROUNDING = 128


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues and how well they are known."""

    values: tuple[float, ...]  # from the largest on down; NaN if a product was not finite
    vectors: Tensor  # an eigenvector of norm 1 in each row
    residuals: tuple[float, ...]  # ‖A x - θ x‖ of each: an eigenvalue lies within it of θ
    num_products: int  # that were made
    converged: bool  # whether all residuals are small enough
    # Largest |xᵀA y - yᵀA x| met between vectors x and y of the basis, relative to the largest eigenvalue in
    # magnitude: rounding, unless A is not one symmetric matrix.
    asymmetry: float


@torch.no_grad()
def extreme_eigenpairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    k: int = 1,
    tol: float = 1e-3,
    max_products: int = 100,
    num_vectors: int | None = None,
    reduce_dots: Callable[[Tensor], Tensor] | None = None,
) -> Eigenpairs:
    """The `k` largest eigenvalues of A, algebraically, not in magnitude.

    Args:
        product: A times a vector of shape (n,), in a new tensor.
        start: The first vector, shape (n,), not zero, best random: eigenvectors orthogonal to it are not found.
        k: Eigenvalues wanted, as many as the space has dimensions at most. One that repeats counts as often as it
            does.
        tol: Largest residual wanted, relative to |θ|. The rounding of the largest eigenvalue in magnitude is good
            enough too: next to it an eigenvalue near zero can't be told from zero.
        max_products: Most products to make.
        num_vectors: Vectors in the basis, at least 2 + twice the number of eigenvalues wanted; 8 or 4 + twice that
            number if None. Fewer take more products, more hardly fewer.
        reduce_dots: If vectors are split over processes, the sum over these of the tensor it gets (float64, on the
            device). If every process holds the whole, their mean, so that all decide the same.

    Returns:
        The eigenpairs.

    Raises:
        ValueError: If `num_vectors`, `k`, `tol` or `max_products` is too small, or `start` is zero.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_vectors = max(8, 2 * k + 4) if num_vectors is None else num_vectors
    if num_vectors < 2 * k + 2:
        raise ValueError(f"num_vectors must be at least {2 * k + 2} for k={k}, got {num_vectors}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_products < k:
        raise ValueError(f"max_products must be at least {k} for k={k}, got {max_products}")
    reduce_dots = reduce_dots or (lambda dots: dots)
    dimension = round(reduce_dots(torch.tensor([start.numel()], dtype=torch.float64, device=start.device)).item())
    basis = _Basis(start, num_vectors, reduce_dots)
    projected = torch.zeros(num_vectors, num_vectors, dtype=torch.float64)
    generator = torch.Generator(start.device).manual_seed(0x1A2C05)  # not likely to be that of `start`
    num_wanted = min(k, dimension)
    # Krylov spaces that must end (w = 0) before that is an answer: a space has only one eigenvector of an eigenvalue
    # that repeats.
    starts_left = k
    w = start.clone()
    if not basis.orthogonalise(w)[1] > 0:
        raise ValueError("start must not be zero")
    asymmetry, coupling = 0.0, torch.zeros(0, dtype=torch.float64)  # of the next member with those before it, in T
    for num_products in range(1, max_products + 1):
        last = basis.append(w)
        del w  # A copy of the weights less while the product is made.
        w = product(last)
        h, beta = basis.orthogonalise(w)
        size = basis.size
        if not math.isfinite(beta):
            missing = (math.nan,) * num_wanted
            return Eigenpairs(
                missing, start.new_full((num_wanted, start.numel()), math.nan), missing, num_products, False, math.nan
            )
        if size > 1:
            asymmetry = max(asymmetry, float((h[:-1] - coupling).abs().max()))
        projected[size - 1, :size] = projected[:size, size - 1] = h
        values, s = torch.linalg.eigh(projected[:size, :size])
        rounding = _ROUNDING * torch.finfo(start.dtype).eps * float(values.abs().max())
        order = range(size)[::-1]  # of the ascending eigenvalues
        wanted = list(order[:num_wanted])
        residuals = beta * s[-1, wanted].abs()
        is_enough = size >= num_wanted and bool((residuals <= (tol * values[wanted].abs()).clamp(min=rounding)).all())
        if size == dimension:
            is_enough = True  # T is all of A
        elif beta <= rounding:
            # Nothing new to find from here: w is rounding alone.
            starts_left -= 1
            is_enough = size >= num_wanted and starts_left <= 0
            w.normal_(generator=generator)
            basis.orthogonalise(w)
        if is_enough or num_products == max_products:
            break
        coupling = torch.zeros(size, dtype=torch.float64)
        coupling[-1] = beta if beta > rounding else 0.0
        if size == num_vectors:
            kept = list(order[: num_wanted + (num_vectors - num_wanted) // 2])
            basis.rotate(s[:, kept])
            coupling = coupling @ s[:, kept]
            projected.zero_()
            projected[range(len(kept)), range(len(kept))] = values[kept]
    basis.rotate(s[:, wanted])
    return Eigenpairs(
        tuple(values[wanted].tolist()),
        basis.vectors[: len(wanted)].clone(),
        tuple(residuals.tolist()),
        num_products,
        is_enough,
        asymmetry / float(values.abs().max()) if asymmetry else 0.0,
    )


class _Basis:
    """Orthonormal vectors, in the rows of one matrix."""

    def __init__(self, like: Tensor, num_vectors: int, reduce_dots: Callable[[Tensor], Tensor]) -> None:
        self.vectors = like.new_empty(num_vectors, like.numel())
        self.size = 0
        self._reduce_dots = reduce_dots

    def append(self, w: Tensor) -> Tensor:
        """Add `w`, normalised and orthogonal as `orthogonalise` has left it."""
        row = self.vectors[self.size]
        row.copy_(w)
        self.size += 1
        return row

    def orthogonalise(self, w: Tensor) -> tuple[Tensor, float]:
        """Take from `w` what it has in the basis, h, and normalise it; h and the norm that was left."""
        held = self.vectors[: self.size]
        h = torch.zeros(self.size, dtype=torch.float64)
        # Twice is enough: after one pass rounding leaves too much where most of w lies in the basis.
        for _ in range(2 if self.size else 0):
            dots = self._dots(held, w)
            w.addmv_(held.T, dots.to(w.dtype), alpha=-1)
            h += dots.cpu()
        norm = math.sqrt(float(self._dots(w[None], w)))
        w.div_(norm if norm > 0 else 1)
        return h, norm

    def rotate(self, s: Tensor) -> None:
        """Replace the basis by its combinations in the columns of `s`."""
        s = s.T.to(self.vectors.device)
        for chunk in self.vectors.split(_CHUNK, dim=1):
            chunk[: len(s)] = (s @ chunk[: s.shape[1]].double()).to(chunk.dtype)
        self.size = len(s)

    def _dots(self, rows: Tensor, w: Tensor) -> Tensor:
        parts = zip(rows.split(_CHUNK, dim=1), w.split(_CHUNK), strict=True)
        total = torch.zeros(len(rows), dtype=torch.float64, device=w.device)
        for part, piece in parts:
            total += part.double() @ piece.double()
        return self._reduce_dots(total)
