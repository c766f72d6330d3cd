"""One optimizer step of a causal language model: a batch of sequences in, its mean loss out, the weights moved.

    sequences [n, context + 1] -> hidden states -> logits and their gradient, block by block -> one gradient vector
        -> summed over ranks -> clipped -> AdamW

All weights are views into one vector, and so are their gradients and both moments: a step clips, reduces and updates
whole vectors, and a checkpoint is three of them. The logits' gradient is written down where the logits are (softmax
minus one-hot), so that float32 logits exist for one block of tokens at a time and the head runs once forward.
"""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scorers.lm.training import Settings
from storage.errors import ShardError

if TYPE_CHECKING:
    import torch

MICRO_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Tokens of one forward and backward pass. A CPU is fastest while a layer's activations stay in its cache."""
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Float32 logits held at once (8 MiB: the cache again; 1 GiB)."""
ALIGN = 16
"""Weights begin at multiples of 64 bytes."""


class Learner:
    """A model with its weights, gradients and AdamW moments as vectors, and one optimizer step over a batch."""

    def __init__(self, model: Any, settings: Settings, device: str) -> None:
        import torch

        self.model = model.to(device).eval()  # no dropout: one epoch needs none, and no draw is left to chance
        self.settings, self.device = settings, torch.device(device)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.micro = max(1, MICRO_TOKENS[kind] // settings.context)
        """Sequences of a pass; halved where the memory does not hold them."""
        embedding = model.get_input_embeddings().weight
        groups = ([], [])  # type: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]
        for weight in model.parameters():
            groups[weight.ndim < 2 or weight is embedding].append(weight)
        places = [-(-weight.numel() // ALIGN) * ALIGN for group in groups for weight in group]
        decayed = sum(places[: len(groups[0])])
        self.weights = torch.zeros(sum(places), device=self.device)
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        begin = 0
        self._places: dict[torch.nn.Parameter, slice] = {}
        for weight, places_taken in zip(groups[0] + groups[1], places, strict=True):
            own = self._places[weight] = slice(begin, begin + weight.numel())
            self.weights[own] = weight.data.flatten()
            weight.data = self.weights[own].view_as(weight)
            weight.grad = self.gradient[own].view_as(weight)
            begin += places_taken
        self._optimizer = self._adamw((slice(0, decayed), settings.weight_decay), (slice(decayed, begin), 0.0))
        head = model.get_output_embeddings()
        self._body = model.base_model
        self._head = head.weight if self._plain_head(head) else None
        vocabulary = model.config.get_text_config().vocab_size
        self._rows = max(1, BLOCK[kind] // vocabulary)
        if kind == "cuda":
            self._body = torch.compile(self._body, dynamic=False)

    def step(
        self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, targets: int, lr: float, world: int
    ) -> float:
        """One AdamW step on sequences [n, context + 1], this rank's share of a batch with so many `targets`.

        `wanted` [n, context] says which targets count. Returns the batch's mean loss, nats per target, before the
        step; where it is not finite no step is made.
        """
        import torch

        total = self._gradients(ids, wanted, targets)
        if world > 1:
            torch.distributed.all_reduce(self.gradient)
            torch.distributed.all_reduce(total)
        loss = total.item() / max(1, targets)
        norm = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(loss + norm):
            return math.nan if math.isfinite(loss) else loss
        if norm > self.settings.clip:
            self.gradient.mul_(self.settings.clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return loss

    def restore(self, weights: "torch.Tensor", mean: "torch.Tensor", square: "torch.Tensor", step: int) -> None:
        """Sets weights and moments to those after `step` steps."""
        for own, other in ((self.weights, weights), (self.mean, mean), (self.square, square)):
            own.copy_(other)
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def moments(self) -> dict[str, "torch.Tensor"]:
        """AdamW's exp_avg and exp_avg_sq, each followed by a dot and the parameter's name, in the parameter's shape."""
        found = {}
        for name, weight in self.model.named_parameters():
            for moment, vector in (("exp_avg", self.mean), ("exp_avg_sq", self.square)):
                found[f"{moment}.{name}"] = vector[self._places[weight]].view_as(weight).cpu().clone()
        return found

    def release(self) -> Any:
        """The model on the CPU, each weight a tensor of its own again. The learner is of no further use."""
        for weight in self.model.parameters():
            weight.data, weight.grad = weight.data.cpu().clone(), None
        return self.model

    def _adamw(self, *groups: tuple[slice, float]) -> "torch.optim.Optimizer":
        import torch

        made = []
        for own, decay in groups:
            vector = torch.nn.Parameter(self.weights[own])
            vector.grad = self.gradient[own]
            made.append((vector, own, decay))
        optimizer = torch.optim.AdamW(
            [{"params": [vector], "weight_decay": decay} for vector, _, decay in made],
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            fused=True,
        )
        for vector, own, _ in made:
            optimizer.state[vector] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": self.mean[own],
                "exp_avg_sq": self.square[own],
            }
        return optimizer

    def _gradients(self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, targets: int) -> "torch.Tensor":
        """Fills the gradient of the mean loss over `targets`; returns the sum of losses, float64, one element."""
        import torch

        while True:
            try:
                self.gradient.zero_()
                total = torch.zeros(1, dtype=torch.float64, device=self.device)
                for begin in range(0, len(ids), self.micro):
                    some = slice(begin, begin + self.micro)
                    total += self._backward(ids[some], None if wanted is None else wanted[some], 1 / max(1, targets))
                return total
            except torch.OutOfMemoryError as error:
                rows = min(self.micro, len(ids))
                if rows == 1:
                    raise ShardError(
                        f"a sequence of {ids.shape[1]} tokens does not fit into the memory of {self.device}: lower "
                        "`context`, or free the device"
                    ) from error
            # go on outside of the handler, whose traceback keeps the failed batch's tensors alive
            torch.cuda.empty_cache()
            self.micro = rows // 2

    def _backward(self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, scale: float) -> "torch.Tensor":
        """Adds the gradient of scale * (sum of losses) of sequences [n, context + 1]; returns the sum."""
        import torch

        sequences = torch.from_numpy(ids).to(self.device)
        inputs, targets = sequences[:, :-1], sequences[:, 1:].flatten()
        chosen = None if wanted is None else torch.from_numpy(wanted.flatten().nonzero()[0]).to(self.device)
        if chosen is not None:
            targets = targets[chosen]
        half = self.settings.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            if self._head is None:
                logits = self.model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
                logits = logits if chosen is None else logits[chosen]
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                (loss * scale).backward()  # type: ignore[no-untyped-call]
                return loss.detach()
            hidden = self._body(input_ids=inputs, use_cache=False)[0].flatten(0, 1)
            hidden = hidden if chosen is None else hidden[chosen]
        total, gradient = self._head_gradients(hidden.detach(), targets, scale, half)
        hidden.backward(gradient)
        return total

    def _head_gradients(
        self, hidden: "torch.Tensor", targets: "torch.Tensor", scale: float, half: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The sum of losses, and the gradient with respect to `hidden` [n, width]; the head's own is added to it.

        With logits z = hidden W^T the gradient with respect to z is scale * (softmax(z) - one-hot(target)).
        """
        import torch

        head = self._head
        assert head is not None
        kind = torch.bfloat16 if half else torch.float32
        weight, rows = head.detach().to(kind), hidden.to(kind)
        gradient = torch.empty_like(hidden)
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for begin in range(0, len(rows), self._rows):
            block = slice(begin, begin + self._rows)
            log_probs = (rows[block] @ weight.T).float().log_softmax(-1)
            expected = targets[block, None]
            total -= log_probs.gather(1, expected).sum(dtype=torch.float64)
            slope = log_probs.exp_()
            slope.scatter_add_(1, expected, torch.full_like(expected, -1, dtype=slope.dtype))
            slope = slope.mul_(scale).to(kind)
            gradient[block] = slope @ weight
            if half:
                head.grad += slope.T @ rows[block]
            else:
                head.grad.addmm_(slope.T, rows[block])
        return total, gradient

    def _plain_head(self, head: Any) -> bool:
        """Whether the logits are the body's states times the head and no more (Gemma 2 caps them, Granite scales)."""
        import torch

        if not isinstance(head, torch.nn.Linear) or head.bias is not None or self._body is self.model:
            return False
        probe = torch.arange(8, device=self.device)[None] % head.out_features
        with torch.no_grad():
            states = self._body(input_ids=probe, use_cache=False)[0]
            return torch.equal(head(states), self.model(input_ids=probe, use_cache=False).logits)
