"""The optimizer's view of a gradient: Adam's direction (LESS) and Adam's scale (TrackStar).

    direction    (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + e)      LESS (Xia et al. 2024, arXiv 2402.04333)
    normalised   g / (sqrt(v) + e)                                        TrackStar, bergson; linear in g

m and v are the optimizer's exp_avg and exp_avg_sq at a checkpoint. As in the code of LESS, e stands inside the root and
no bias is corrected. LESS takes the direction of the documents of the index alone, not of the target's, at several
checkpoints, and weighs their cosines by the mean learning rate of each checkpoint's epoch over the sum of them.

Both are applied to whole gradients before they are projected, one document at a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scorers.influence.gradients import Document, GradientModel, projected
from scorers.influence.layers import Layer, canonical, kind
from scorers.influence.projection import Projection
from scorers.influence.reducers import Transform
from scorers.lm.training import MOMENTS
from storage.errors import RecipeError

if TYPE_CHECKING:
    import torch

EPSILON = 1e-8


def moments(model: GradientModel, folder: str) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
    """exp_avg and exp_avg_sq, as `by_layer` has them, out of a model's folder. RecipeError where it has none."""
    from safetensors.torch import load_file

    file = Path(folder, MOMENTS)
    if not file.is_file():
        raise RecipeError(f"adam: {folder!r} has no {MOMENTS}; train the model with keep_moments = true")
    found = load_file(file)
    first, second = (
        by_layer(model, {name.partition(".")[2]: each for name, each in found.items() if name.startswith(f"{moment}.")})
        for moment in ("exp_avg", "exp_avg_sq")
    )
    return first, second


def by_layer(model: GradientModel, moments: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The optimizer's moments by parameter name as gradients lie: [outputs, inputs] by layer name, bias last, float32.

    RecipeError when a layer's parameters have none, or one of another shape.
    """
    import torch

    given = {canonical(name): moment for name, moment in moments.items()}
    modules = dict(model.lm.model.named_modules())

    def moment(layer: Layer, part: str, columns: int) -> "torch.Tensor":
        names = [f"{canonical(module)}.{part}" for module in layer.modules]
        found = next((given[name] for name in names if name in given), None)
        if found is None:
            raise RecipeError(f"the optimizer's state has no moment of {names[0]!r}; choose other layers")
        if found.ndim == 1:
            found = found[:, None]
        elif kind(modules[layer.modules[0]]) == "conv1d":
            found = found.T
        if found.shape != (layer.outputs, columns):
            raise RecipeError(f"the optimizer's moment of {names[0]!r} has another shape; take that of this model")
        return found.to(model.lm.device, torch.float32)

    return {
        a.name: torch.cat([moment(a, "weight", a.inputs - a.bias), *([moment(a, "bias", 1)] if a.bias else [])], dim=1)
        for a in model.layers
    }


def normalised(second: Mapping[str, "torch.Tensor"], *, epsilon: float = EPSILON) -> Transform:
    """g / (sqrt(v) + e), with v of `by_layer`. Linear, so it may be applied to a sum of gradients; for both sides."""
    return lambda layer, gradient: gradient / (second[layer.name].sqrt() + epsilon)


def direction(
    first: Mapping[str, "torch.Tensor"],
    second: Mapping[str, "torch.Tensor"],
    *,
    tokens: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = EPSILON,
) -> Transform:
    """Adam's next step for the gradient of one document of so many predicted `tokens`, up to the learning rate.

    Not linear: the gradient must be on the scale of the moments, and those are of a loss averaged over tokens. A weight
    that was never updated (v = 0) comes out at up to (1 - b1) / sqrt(1 - b2) = 3.16, whatever its gradient's size, and
    can outweigh all others in a cosine: take moments of a run that updated the chosen layers.
    """
    b1, b2 = betas

    def transform(layer: Layer, gradient: "torch.Tensor") -> "torch.Tensor":
        mean = gradient / tokens
        m = b1 * first[layer.name] + (1 - b1) * mean
        v = b2 * second[layer.name] + (1 - b2) * mean.square()
        return m / (v + epsilon).sqrt()

    return transform


def directions(
    model: GradientModel,
    documents: Sequence[Document | None],
    projection: Projection,
    first: Mapping[str, "torch.Tensor"],
    second: Mapping[str, "torch.Tensor"],
) -> NDArray[np.float32]:
    """The documents' projected directions [n, projection.dimensions], each of the document's mean loss over its tokens.

    Zeros for a document without a token that counts.
    """
    rows = np.zeros((len(documents), projection.dimensions), np.float32)
    for number, document in enumerate(documents):
        if document is not None and (tokens := model.n_predicted(document)):
            rows[number] = projected(model, [document], projection, direction(first, second, tokens=tokens))[0]
    return rows
