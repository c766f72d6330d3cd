"""What becomes of the factors of a pass: projected rows, squared norms, whole gradients, covariances.

Factors come in two kinds of left: numbers [n, T, outputs], or token ids [n, T] that stand for one-hot rows. All sums
over layers and tokens are float32 or wider, whatever the model computes in.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from scorers.influence.layers import Layer
from scorers.influence.projection import Projection

if TYPE_CHECKING:
    import torch

    from scorers.influence.capture import Batch

MATERIALISED = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Numbers of gradients that stand in memory at once while squared norms are taken (16 MiB: a cache; 1 GiB)."""


class Projected:
    """Rows [N, dimensions], float32: each window's projected gradient."""

    def __init__(self, batch: "Batch", projection: Projection) -> None:
        import torch

        self._projection = projection
        self.rows = torch.zeros(len(batch.inputs), projection.dimensions, device=batch.inputs.device)

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        right = self._projection.right[layer.name]
        if right is None:
            return _with_ones(inputs) if bias else _up_to(inputs, layer.inputs)
        width = inputs.shape[-1]
        held = inputs @ right[:, :width].T
        return held + right[:, width] if bias else held

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        import torch

        signs = self._projection.left[layer.name]
        if left.is_floating_point():
            left = left if signs is None else left @ signs.T
        elif signs is None:
            left = torch.nn.functional.one_hot(left, layer.outputs)
        else:
            left = signs.T[left]
        block = torch.bmm(left.float().transpose(1, 2), held.float())
        self.rows[rows, self._projection.at[layer.name]] += block.flatten(1) * self._projection.scale[layer.name]


class SquaredNorms:
    """Squared norms [N], float64, of each window's gradient over all layers together.

    Per layer the cheaper of two exact routes (Li et al. 2022, arXiv 2110.05679, "ghost norm"):

        materialise      sum of squares of left^T right                       T I O multiply-adds a window
        ghost            sum of (left left^T) * (right right^T)               T^2 (I + O)

    so ghost where T < I O / (I + O); measured on a CPU, both take the same time within a tenth of that length. For an
    embedding the rows of equal tokens are added up. Of tied embeddings the square has the cross term besides: twice
    the inner product of the two gradients.
    """

    def __init__(self, batch: "Batch") -> None:
        import torch

        self._ids = batch.inputs
        self.norms = torch.zeros(len(batch.inputs), dtype=torch.float64, device=batch.inputs.device)
        self._heads: list[tuple[torch.Tensor, torch.Tensor, slice]] = []

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        return inputs

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        right = held.float()
        if not left.is_floating_point():
            self.norms[rows] += _embedding(left, right)
            for head, hidden, some in self._heads if len(layer.modules) > 1 else ():
                self.norms[some] += 2 * (head * (hidden @ right[some].transpose(1, 2))).sum((1, 2))
            return
        left = left.float()
        n, length, outputs = left.shape
        if length * (right.shape[2] + outputs) < right.shape[2] * outputs:
            self.norms[rows] += _ghost(left, right, bias)
        else:
            self.norms[rows] += _materialised(left, right)
            if bias:
                self.norms[rows] += left.sum(1).square().sum(1)
        if len(layer.modules) > 1:  # what the input embedding, which comes last, has in common with the output's
            tokens = self._ids[rows, None].expand(n, length, length)
            self._heads.append((left.gather(2, tokens), right, rows))


class Summed:
    """Whole gradients [outputs, inputs] by layer name, float32: the sum over the batch's windows."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        return inputs

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        import torch

        if layer.name not in self.gradients:
            self.gradients[layer.name] = torch.zeros(layer.outputs, layer.inputs, device=held.device)
        gradient, width = self.gradients[layer.name], held.shape[-1]
        right = held.float().flatten(0, 1)
        if not left.is_floating_point():
            gradient[:, :width].index_add_(0, left.flatten(), right)
            return
        left = left.float().flatten(0, 1)
        gradient[:, :width].addmm_(left.T, right)
        if bias:
            gradient[:, width] += left.sum(0)


class Covariances:
    """Sums over the batch's tokens by layer name: right right^T [inputs, inputs] and left left^T [outputs, outputs].

    Places that hold no token count in neither. The factors of K-FAC (Martens and Grosse 2015, arXiv 1503.05671) are
    these over the number of tokens, which `tokens` counts.
    """

    def __init__(self, batch: "Batch") -> None:
        self._fed = batch.fed
        self.tokens = int(batch.fed.sum())
        self.right: dict[str, torch.Tensor] = {}
        self.left: dict[str, torch.Tensor] = {}

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        return inputs

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        right = (_with_ones(held) if bias else held)[self._fed].float()
        left = left[self._fed].float()
        self.right[layer.name] = right.T @ right
        self.left[layer.name] = left.T @ left


def _with_ones(inputs: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.nn.functional.pad(inputs, (0, 1), value=1.0)


def _up_to(inputs: "torch.Tensor", width: int) -> "torch.Tensor":
    """The inputs, with zeros for a bias that the layer has in another module."""
    import torch

    return torch.nn.functional.pad(inputs, (0, width - inputs.shape[-1])) if inputs.shape[-1] < width else inputs


def _ghost(left: "torch.Tensor", right: "torch.Tensor", bias: bool) -> "torch.Tensor":
    import torch

    inputs = torch.bmm(right, right.transpose(1, 2))
    return (torch.bmm(left, left.transpose(1, 2)) * (inputs + 1 if bias else inputs)).sum((1, 2), dtype=torch.float64)


def _materialised(left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    """Squared norms [n] of left^T right, of which MATERIALISED numbers stand at once."""
    import torch

    n, _, outputs = left.shape
    room = MATERIALISED["cpu" if left.device.type == "cpu" else "cuda"] // right.shape[2]
    rows, columns = max(1, room // outputs), max(1, min(outputs, room))
    norms = torch.zeros(n, dtype=torch.float64, device=left.device)
    for start in range(0, n, rows):
        some = slice(start, start + rows)
        for first in range(0, outputs, columns):
            part = torch.bmm(left[some, :, first : first + columns].transpose(1, 2), right[some])
            norms[some] += part.square_().sum((1, 2), dtype=torch.float64)
    return norms


def _embedding(ids: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    """Squared norms [n] of the gradients of a table of which row ids[i, t] is given right[i, t]."""
    import torch

    n = len(ids)
    numbers = ids + (ids.max() + 1) * torch.arange(n, device=ids.device)[:, None]
    keys, places = torch.unique(numbers, return_inverse=True)
    rows = torch.zeros(len(keys), right.shape[2], device=right.device)
    rows.index_add_(0, places.flatten(), right.flatten(0, 1))
    norms = torch.zeros(n, dtype=torch.float64, device=right.device)
    return norms.index_add_(0, keys // (ids.max() + 1), rows.double().square().sum(1))


Transform = Callable[[Layer, "torch.Tensor"], "torch.Tensor"]
"""A document's gradient of a layer [outputs, inputs] into what is projected instead: an optimiser's direction, say."""
