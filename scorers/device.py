"""Which device scores, with how many threads, and how arrays come to it. Importing this loads no torch."""

import sys
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def best_device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_with(threads: int) -> None:
    """Torch, where it is loaded, computes with so many threads in this process; by itself it takes every core."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def to_device(array: NDArray[np.int64], device: "torch.device") -> "torch.Tensor":
    """The array as a tensor there: a copy that a GPU fetches by itself, while this thread goes on to the next batch."""
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
