"""One forward and one backward pass of a causal language model, and what each layer saw in it.

    windows of documents, padded right -> hidden states -> summed loss -> back to the first captured layer

Hooks on the chosen modules hand over, per layer and as soon as it is there, the two factors of its gradient:

    left [n, T, outputs]   the loss by the layer's output; for an embedding the token ids [n, T], its one-hot rows
    right [n, T, inputs]   the layer's input; for an embedding the loss by its output

so that window i's gradient is sum_t left[i, t] right[i, t]^T. The loss is the sum over the targets, hence no window
knows of another; padding stands to the right, is no target, and its left rows are zero. What a reducer holds of the
inputs between the passes is all the memory that this takes beside the activations: the weights themselves ask for no
gradient, and what lies below the lowest captured layer is not passed back through.

The vocabulary goes by blocks: logits, softmax minus one-hot, and back to the hidden states, in one step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scorers.device import to_device
from scorers.influence.layers import Layer, Uncaptured, choose, kind, uncapturable
from scorers.lm.forward import BLOCK, CausalLM

if TYPE_CHECKING:
    import torch

Seed = tuple[int, int] | None
"""What the targets of a batch are drawn with: a seed, and the number of the batch's first window."""
IGNORED = -100
"""The target of a place that is none."""


@dataclass(frozen=True)
class Batch:
    """What one pass reads.

    Attributes:
        owners: the document number of each window [N].
        inputs: token ids [N, T], zeros behind a window's end.
        targets: the token that each place should predict [N, T], or IGNORED.
        fed: whether a place holds a token [N, T].
        uniforms: in [0, 1) for each place [N, T], where the targets are to be sampled from the model's own prediction.
    """

    owners: NDArray[np.int64]
    inputs: "torch.Tensor"
    targets: "torch.Tensor"
    fed: "torch.Tensor"
    uniforms: "torch.Tensor | None" = None


class Reducer(Protocol):
    """What becomes of the factors of one pass. `rows` are the windows of the batch that they belong to."""

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        """What to keep, until `add`, of a layer's inputs [n, T, inputs without the bias]."""

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        """Take the factors of a layer, or of one of the two modules that apply it. `bias`: whether this one has one."""


class Capture:
    """A language model whose chosen layers show their factors.

    RecipeError when a layer cannot be captured: besides what scorers.influence.layers says, what is not applied once
    in every pass to all tokens of all windows (experts that see some tokens, adapters that are switched off).
    """

    def __init__(self, lm: CausalLM, patterns: Sequence[str] | None, uncaptured: Uncaptured) -> None:
        self.lm = lm
        self._now: tuple[Batch, Reducer] | None = None
        lm.model.requires_grad_(False)
        layers = choose(lm.model, patterns, uncaptured)
        probe = _Probe()
        hooks = self._watch(layers)
        self.run(self.batch([(np.zeros(8, np.int64), np.zeros(8, np.int64))] * 2, [0, 1]), probe)
        bad = {name: reason for layer in layers for name, reason in probe.problems(layer)}
        if bad and uncaptured == "refuse":
            raise uncapturable(bad)
        self.layers = tuple(layer for layer in layers if not set(layer.modules) & bad.keys())
        if not self.layers:
            raise uncapturable(bad)
        for hook in hooks:
            hook.remove()
        self._watch(self.layers)

    def batch(
        self, rows: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], owners: Sequence[int], seed: Seed = None
    ) -> Batch:
        """Windows (inputs, targets), of one length each, as a batch on the device.

        `seed`: draw the targets from the model's predictions, with numbers that depend on it and on the place.
        """
        rows = list(rows)
        shape = len(rows), max(inputs.size for inputs, _ in rows)
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        fed = np.zeros(shape, np.int64)
        for number, (ids, wanted) in enumerate(rows):
            inputs[number, : ids.size] = ids
            targets[number, : ids.size] = wanted
            fed[number, : ids.size] = 1
        moved = [to_device(array, self.lm.device) for array in (inputs, targets, fed)]
        uniforms = None
        if seed is not None:
            import torch

            uniforms = torch.from_numpy(np.random.default_rng(seed).random(shape)).to(self.lm.device)
        return Batch(np.asarray(owners, np.int64), moved[0], moved[1], moved[2].bool(), uniforms)

    def run(self, batch: Batch, reducer: Reducer) -> None:
        """One pass over the batch; the reducer is handed the factors of every layer."""
        import torch

        model = self.lm.model
        self._now = batch, reducer
        try:
            with torch.enable_grad():
                if self.lm.blockwise:
                    hidden = model.base_model(input_ids=batch.inputs, use_cache=False)[0]
                    gradient = self._through_the_head(hidden.detach(), batch, reducer)
                    if hidden.requires_grad:
                        hidden.backward(gradient)
                else:
                    logits = model(input_ids=batch.inputs, use_cache=False).logits
                    if logits.requires_grad:
                        with torch.no_grad():
                            flat = logits.detach().flatten(0, 1)
                            gradient = self._residual(flat, batch, slice(None)).view_as(logits)
                        logits.backward(gradient.to(logits.dtype))
        finally:
            self._now = None

    def _through_the_head(self, hidden: "torch.Tensor", batch: Batch, reducer: Reducer) -> "torch.Tensor":
        """The loss by the hidden states [N, T, width], without all the logits at once."""
        import torch

        head = self.lm.model.get_output_embeddings()
        layer = next((a for a in self.layers_of_head if a), None)
        with torch.no_grad():
            gradient = torch.zeros_like(hidden)
            per_block = max(1, BLOCK["cpu" if hidden.device.type == "cpu" else "cuda"] // head.weight.shape[0])
            if layer is None:
                flat, out = hidden.flatten(0, 1), gradient.flatten(0, 1)
                places = (batch.targets.flatten() != IGNORED).nonzero()[:, 0]
                for some in torch.split(places, per_block):
                    left = self._residual(head(flat[some]), batch, some)
                    out[some] = left.to(hidden.dtype) @ head.weight
                return gradient
            step = max(1, per_block // hidden.shape[1])
            for start in range(0, len(hidden), step):
                rows = slice(start, start + step)
                places = (
                    torch.arange(batch.targets.numel(), device=hidden.device).view_as(batch.targets)[rows].flatten()
                )
                left = self._residual(head(hidden[rows]).flatten(0, 1), batch, places)
                left = left.view(*hidden[rows].shape[:2], -1).to(hidden.dtype)
                gradient[rows] = left @ head.weight
                bias = head.bias is not None
                reducer.add(layer, left, reducer.hold(layer, hidden[rows], bias), bias, rows)
            return gradient

    @staticmethod
    def _residual(logits: "torch.Tensor", batch: Batch, places: "torch.Tensor | slice") -> "torch.Tensor":
        """The summed loss by its logits [places, vocabulary] in float32: softmax minus one-hot, zero for no target."""
        targets = batch.targets.flatten()[places]
        residual = logits.float().softmax(-1)
        counts = targets != IGNORED
        if batch.uniforms is not None:
            below = residual.double().cumsum(-1)
            drawn = (below <= batch.uniforms.flatten()[places, None] * below[:, -1:]).sum(-1)
            targets = drawn.clamp(max=logits.shape[-1] - 1).where(counts, targets)
        residual.scatter_add_(1, targets.clamp(min=0)[:, None], -residual.new_ones(len(targets), 1))
        return residual.mul_(counts[:, None]) if not bool(counts.all()) else residual

    def _watch(self, layers: Sequence[Layer]) -> list[Any]:
        """Hooks on the layers' modules. The head of a model that goes by blocks is never called as a module there."""
        head = self.lm.model.get_output_embeddings() if self.lm.blockwise else None
        modules = dict(self.lm.model.named_modules())
        self.layers_of_head = [layer for layer in layers if any(modules[name] is head for name in layer.modules)]
        hooks = []
        for layer in layers:
            for name in layer.modules:
                module = modules[name]
                if module is not head:
                    hook = self._embedding_hook if kind(module) == "embedding" else self._linear_hook
                    hooks.append(module.register_forward_hook(hook(layer, module)))
        return hooks

    def _linear_hook(self, layer: Layer, module: Any) -> Any:
        bias = module.bias is not None

        def forward(_: Any, args: tuple[Any, ...], output: "torch.Tensor") -> None:
            if self._now is None:
                return
            batch, reducer = self._now
            inputs = args[0].detach()
            if isinstance(reducer, _Probe) and not reducer.fits(layer, inputs.shape[:-1], batch):
                return
            held = reducer.hold(layer, inputs, bias)
            _when_known(output, lambda gradient: reducer.add(layer, gradient, held, bias, slice(None)))

        return forward

    def _embedding_hook(self, layer: Layer, module: Any) -> Any:
        def forward(_: Any, args: tuple[Any, ...], output: "torch.Tensor") -> "torch.Tensor | None":
            if self._now is None:
                return None
            batch, reducer = self._now
            ids = args[0]
            if ids.shape[0] == 1:  # positions are looked up once for all windows; each needs its own gradient
                ids, output = ids.expand(batch.inputs.shape), output.expand(*batch.inputs.shape, -1)
            if isinstance(reducer, _Probe) and not reducer.fits(layer, ids.shape, batch):
                return None
            factor = getattr(module, "embed_scale", 1)

            def known(gradient: "torch.Tensor") -> None:
                right = gradient * factor
                if module.padding_idx is not None:
                    right = right.masked_fill((ids == module.padding_idx)[..., None], 0)
                reducer.add(layer, ids, reducer.hold(layer, right, False), False, slice(None))

            _when_known(output, known)
            return output

        return forward


def _when_known(output: "torch.Tensor", then: Any) -> None:
    """Call `then` with the loss by `output` in the backward pass, which begins here where nothing below is captured."""
    if not output.requires_grad:
        output.requires_grad_()
    output.register_hook(then)  # type: ignore[no-untyped-call]


class _Probe:
    """Sees which layers are applied how often, and to what."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.wrong: Mapping[str, str] = {}

    def fits(self, layer: Layer, shape: Sequence[int], batch: Batch) -> bool:
        if tuple(shape) != tuple(batch.inputs.shape):
            self.wrong = {**self.wrong, layer.name: f"sees {list(shape)} tokens of {list(batch.inputs.shape)}"}
            return False
        return True

    def hold(self, layer: Layer, inputs: "torch.Tensor", bias: bool) -> "torch.Tensor":
        return inputs

    def add(self, layer: Layer, left: "torch.Tensor", held: "torch.Tensor", bias: bool, rows: slice) -> None:
        self.calls[layer.name] = self.calls.get(layer.name, 0) + (not rows.start)

    def problems(self, layer: Layer) -> Iterable[tuple[str, str]]:
        calls = self.calls.get(layer.name, 0)
        if layer.name in self.wrong:
            yield layer.modules[0], self.wrong[layer.name]
        elif calls != len(layer.modules):
            yield layer.modules[0], f"is applied {calls} times in a pass"
