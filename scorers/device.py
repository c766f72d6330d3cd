"""Which device scores, and with how many threads, for whoever must not import torch."""

import sys


def best_device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_with(threads: int) -> None:
    """Torch, where it is loaded, computes with so many threads in this process; by itself it takes every core."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
