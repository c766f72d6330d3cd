"""Which parameters a gradient is taken of: layers by name, and what of a model cannot be captured.

A layer is one weight matrix [outputs, inputs], with its bias as one input more that is always 1. What can be captured
is what multiplies each token's features by it:

    Linear, Conv1D (GPT-2's, stored transposed)      G = sum over tokens of  (loss by output) (input)^T
    Embedding [vocabulary, width]                    G = sum over tokens of  (one-hot token)  (loss by output)^T
    an output embedding tied to the input's          both sums, of one matrix

Norms have vectors, not matrices, and are left out everywhere, as in bergson and LESS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from storage.errors import RecipeError

Uncaptured = Literal["refuse", "skip"]

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and checkpointing put into the names of a model's modules."""


@dataclass(frozen=True)
class Layer:
    """One weight matrix. Equal names mean equal random projections.

    Attributes:
        name: of the module that holds it (the first of them), without wrappers.
        outputs, inputs: the shape of its gradient; a bias counts as the last input.
        modules: the names by which the model itself knows the modules that apply it: one, or input and output
            embedding.
        table: whether one side is a vocabulary (or positions).
    """

    name: str
    outputs: int
    inputs: int
    bias: bool
    modules: tuple[str, ...]
    table: bool

    @property
    def size(self) -> int:
        """Numbers in its gradient."""
        return self.outputs * self.inputs


def canonical(name: str) -> str:
    """A module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def choose(model: Any, patterns: Sequence[str] | None, uncaptured: Uncaptured) -> tuple[Layer, ...]:
    """The layers of `model` that the glob `patterns` name, in name order; None for all but the embeddings.

    A pattern that matches one of two tied embeddings takes their one matrix, and so both uses of it. RecipeError for a
    pattern that matches nothing and, unless `uncaptured` is "skip", for modules whose parameters cannot be captured.
    """
    modules = {name: module for name, module in model.named_modules() if any(True for _ in _own(module))}
    head = model.get_output_embeddings()

    def wanted(name: str) -> bool:
        if patterns is None:
            return kind(modules[name]) != "embedding" and modules[name] is not head
        return any(fnmatchcase(canonical(name), pattern) for pattern in patterns)

    candidates = [name for name, module in modules.items() if not _is_norm(module)]
    for pattern in patterns or ():
        if not any(fnmatchcase(canonical(name), pattern) for name in candidates):
            raise RecipeError(f"layers: {pattern!r} matches none of {_shown(list(map(canonical, candidates)))}")
    sharing: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in _own(module):
            sharing.setdefault(id(parameter), []).append(name)
    layers: dict[tuple[str, ...], Layer] = {}
    refused: dict[str, str] = {}
    for name in filter(wanted, candidates):
        if kind(modules[name]) is None:
            refused[name] = type(modules[name]).__name__
            continue
        group = tuple(sharing[id(modules[name].weight)])
        if len(group) > 1 and sorted(str(kind(modules[n])) for n in group) != ["embedding", "linear"]:
            refused[name] = f"shares its weight with {_shown([n for n in group if n != name])}"
            continue
        layers[group] = _layer(modules, group, any(modules[n] is head for n in group))
    if refused and uncaptured == "refuse":
        raise uncapturable(refused)
    found = tuple(sorted(layers.values(), key=lambda layer: layer.name))
    if not found:
        raise RecipeError("layers: no linear layer or embedding is left to take gradients of; name others")
    if len({layer.name for layer in found}) < len(found):
        raise RecipeError("layers: two modules have one name once wrappers are left out of it; rename one")
    return found


def uncapturable(reasons: Mapping[str, str]) -> RecipeError:
    """The error that names modules whose gradients cannot be captured, and why."""
    told = [f"{canonical(name)} ({reason})" for name, reason in reasons.items()]
    return RecipeError(
        f"layers: the gradients of {_shown(told)} cannot be captured; choose others with `layers`, or leave these out "
        'with uncaptured = "skip"'
    )


def kind(module: Any) -> Literal["linear", "conv1d", "embedding"] | None:
    """How a module applies its matrix; None for one that is none of ours, or a subclass that does something else."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return "conv1d"
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or hasattr(module, "embed_scale")):
        return "embedding"
    return None


def _own(module: Any) -> Any:
    return module.parameters(recurse=False)


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for p in _own(module))


def _layer(modules: Mapping[str, Any], group: tuple[str, ...], head: bool) -> Layer:
    rows, columns = modules[group[0]].weight.shape
    if kind(modules[group[0]]) == "conv1d":
        rows, columns = columns, rows
    bias = any(getattr(modules[name], "bias", None) is not None for name in group)
    table = head or any(kind(modules[name]) == "embedding" for name in group)
    return Layer(canonical(group[0]), rows, columns + bias, bias, group, table)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
