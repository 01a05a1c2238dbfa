"""How far the matrices of a model have moved along one direction, which tells how fast a ramp they bear.

Let D = W_t - W_0 be the movement of a weight matrix since the first step. Its coherence is

    ‖D‖₂ / ‖D‖_F,

1 where all rows of D are multiples of one direction and 1/√k where k directions have the same share. In the first
descent of a transformer, from the loss at initialization to about the unigram entropy, it tells two kinds apart
(recipes/studies/guided.md):

* in masked language models it is .84 to .99. A position that is masked shows nothing of its label: all that it can
  be taught at first is how often each token comes, which pushes every position one way, and with them the matrices.
* in causal ones it is .56 to .85, as the present token tells something of the next one from the first step on.

A model that has moved along one direction only is scrambled by a fast descent.

A block of a matrix will do, as the rows and columns of what has one direction have it too. The blocks are numbers,
the same on every process, so that a controller can keep them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_MOST, _SIDE = 16, 32  # matrices looked at, and rows and columns of each
_FEWEST = 4  # matrices, which is what one layer of a transformer has: of fewer the median says little


def coherence(moves: Iterable[Tensor]) -> float:
    """The median of ‖D‖₂ / ‖D‖_F.

    Args:
        moves: Matrices D.

    Returns:
        Between 1/√rows and 1, those that have not moved being left out; NaN if none has moved, or one is not finite.
    """
    moved = [d for d in moves if d.any()]
    if not moved or not all(d.isfinite().all() for d in moved):
        return math.nan
    return statistics.median(float(torch.linalg.matrix_norm(d, 2) / torch.linalg.matrix_norm(d)) for d in moved)


def inner_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Those whose movement is looked at.

    Args:
        module: The model.

    Returns:
        At most 16 trained matrices at even distances, none of them of an `nn.Embedding`; none at all of a model that
        has fewer than 4.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    found = [p for p in module.parameters() if p.requires_grad and _num_dims(p) == 2 and id(p) not in embeddings]
    if len(found) < _FEWEST:
        return []
    kept = min(_MOST, len(found))
    return [found[i * (len(found) - 1) // (kept - 1)] for i in range(kept)]


def _num_dims(p: nn.Parameter) -> int:
    return len(getattr(p, "ds_shape", p.shape))  # ZeRO-3 leaves an empty tensor in a parameter's place


def whole(p: Tensor) -> Tensor:
    """A parameter's values, of a DTensor those of all processes together; on all of them at once."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


class MatrixMovement:
    """How a model's matrices move, as numbers of a block of each: its first 32 rows and columns.

    Args:
        module: The model.
        values: Gives the values of a parameter; on all processes at once where that takes all of them.
    """

    def __init__(self, module: nn.Module, values: Callable[[nn.Parameter], Tensor] = whole) -> None:
        self._matrices, self._values = inner_matrices(module), values

    def where(self) -> list[list[float]]:
        """The numbers of each block, row by row; of no blocks for a model of fewer than 4 matrices."""
        return [block.flatten().tolist() for block in self._blocks()]

    def coherence(self, starts: Sequence[Sequence[float]]) -> float:
        """That of the blocks' movement since `where` gave `starts`: `coherence`.

        Args:
            starts: What `where` gave then.

        Returns:
            The median over the blocks.

        Raises:
            ValueError: If `starts` is of other blocks.
        """
        blocks = list(self._blocks())
        if [len(start) for start in starts] != [block.numel() for block in blocks]:
            raise ValueError(f"starts must be of the {len(blocks)} blocks of this model, got {len(starts)} of others")
        pairs = zip(blocks, starts, strict=True)
        return coherence(block - torch.tensor(start, dtype=block.dtype).view_as(block) for block, start in pairs)

    def _blocks(self) -> Iterable[Tensor]:
        for p in self._matrices:
            yield self._values(p)[:_SIDE, :_SIDE].to("cpu", torch.float64)
