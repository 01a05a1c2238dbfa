"""The largest eigenvalue of a symmetric matrix that is only known by its products with vectors.

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
the solver. Memory: nine vectors, and what a product takes.

[1] Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
    Appl. 22 (2000).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_VECTORS = 8  # in the basis; fewer take more products, more hardly fewer
# Elements of each vector that are in double precision at a time: 17 MB with a basis of 8.
_CHUNK = 2**18
# Times the largest eigenvalue in magnitude: what rounding leaves of a product that should be inside the basis.
_ROUNDING = 128


@dataclass(frozen=True)
class Eigenpair:
    """The largest eigenvalue and how well it is known."""

    value: float  # NaN if a product was not finite
    vector: Tensor  # its eigenvector of norm 1
    residual: float  # ‖A x - θ x‖: an eigenvalue lies within it of θ
    num_products: int  # that were made
    converged: bool  # whether the residual is small enough
    # Largest |xᵀA y - yᵀA x| met between vectors x and y of the basis, relative to the largest eigenvalue in
    # magnitude: rounding, unless A is not one symmetric matrix.
    asymmetry: float


@torch.no_grad()
def largest_eigenpair(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tol: float,
    max_products: int,
    reduce_dots: Callable[[Tensor], Tensor] | None = None,
) -> Eigenpair:
    """The largest eigenvalue of A, algebraically, not in magnitude.

    Args:
        product: A times a vector of shape (n,), in a new tensor.
        start: The first vector, shape (n,), not zero, best random: eigenvectors orthogonal to it are not found.
        tol: Largest residual wanted, relative to |θ|. The rounding of the largest eigenvalue in magnitude is good
            enough too: next to it an eigenvalue near zero can't be told from zero.
        max_products: Most products to make, at least 1.
        reduce_dots: If vectors are split over processes, the sum over these of the tensor it gets (float64, on the
            device). If every process holds the whole, their mean, so that all decide the same.

    Returns:
        The eigenpair.

    Raises:
        ValueError: If `start` is zero.
    """
    basis = _Basis(start, reduce_dots or (lambda dots: dots))
    projected = torch.zeros(_NUM_VECTORS, _NUM_VECTORS, dtype=torch.float64)
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
            missing = torch.full_like(start, math.nan)
            return Eigenpair(math.nan, missing, math.nan, num_products, False, math.nan)
        if size > 1:
            asymmetry = max(asymmetry, float((h[:-1] - coupling).abs().max()))
        projected[size - 1, :size] = projected[:size, size - 1] = h
        values, s = (part.flip(-1) for part in torch.linalg.eigh(projected[:size, :size]))  # from the largest on down
        residual = beta * abs(float(s[-1, 0]))
        rounding = _ROUNDING * torch.finfo(start.dtype).eps * float(values.abs().max())
        # Where w is rounding alone, as where the basis spans the whole space, the residual is too.
        converged = residual <= max(tol * abs(float(values[0])), rounding)
        if converged or num_products == max_products:
            break
        coupling = torch.zeros(size, dtype=torch.float64)
        coupling[-1] = beta
        if size == _NUM_VECTORS:
            kept = _NUM_VECTORS // 2
            basis.rotate(s[:, :kept])
            coupling = coupling @ s[:, :kept]
            projected.zero_()
            projected[range(kept), range(kept)] = values[:kept]
    basis.rotate(s[:, :1])
    return Eigenpair(
        float(values[0]),
        basis.vectors[0].clone(),
        residual,
        num_products,
        converged,
        asymmetry / float(values.abs().max()) if asymmetry else 0.0,
    )


class _Basis:
    """Orthonormal vectors, in the rows of one matrix."""

    def __init__(self, like: Tensor, reduce_dots: Callable[[Tensor], Tensor]) -> None:
        self.vectors = like.new_empty(_NUM_VECTORS, like.numel())
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
