"""Tokenizers from what a model's owner ships: a folder, a GGUF file, a bare tokenizer.json, or a name on the hub.

    folder/                          tokenizer.json, or the older vocabulary files that transformers can convert
    folder/model.gguf, model.gguf    the tokenizer inside the file's metadata
    tokenizer.json                   the Rust tokenizer's own file
    hf://owner/name                  the folder that scorers.hub finds

Two views of the same thing: `load_tokenizer` gives the Rust tokenizer, which counts and cuts in batches without the
interpreter's lock; `load_pretrained` adds what transformers knows of a model's special tokens (BOS above all).
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorers.hub import local
from storage.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def gguf_file(path: str) -> Path | None:
    """The GGUF file that `path` is or, as a folder without a config.json, holds; None for any other folder or file.

    RecipeError for a folder with several: quantizations of one model differ in every score, so the recipe must choose.
    """
    target = Path(local(path))
    if target.suffix == ".gguf":
        return target
    if not target.is_dir() or (target / "config.json").exists():
        return None
    found = sorted(target.glob("*.gguf"))
    if len(found) > 1:
        raise RecipeError(f"{path!r} holds {len(found)} GGUF files; name one of {', '.join(p.name for p in found)}")
    return found[0] if found else None


def load_tokenizer(path: str) -> "Tokenizer":
    """The Rust tokenizer of a model's folder, GGUF file or tokenizer.json, without padding or truncation.

    A tokenizer.json is read directly, and neither torch nor transformers is imported. RecipeError when there is no
    tokenizer at `path`, or one that only runs in Python.
    """
    from tokenizers import Tokenizer

    target = Path(local(path))
    file = target / "tokenizer.json" if target.is_dir() else target
    if file.suffix == ".json" and file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises the bare class
            raise RecipeError(f"{str(file)!r} is no tokenizer: {error}; correct the path") from error
    else:
        tokenizer = load_pretrained(path).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_pretrained(path: str, *, remote_code: bool = False) -> Any:
    """The transformers tokenizer of a model's folder or GGUF file; its Rust tokenizer neither pads nor cuts.

    `remote_code`: whether Python that lies beside it may run. RecipeError when there is no tokenizer at `path`, or one
    without a Rust form.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    gguf = gguf_file(path)
    try:
        with quiet():
            if gguf is None:
                tokenizer = AutoTokenizer.from_pretrained(
                    local(path), local_files_only=True, trust_remote_code=remote_code
                )
            else:  # not AutoTokenizer, which would read the whole metadata once more for the model's class
                tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    str(gguf.parent), gguf_file=gguf.name, local_files_only=True
                )
    except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "name a model's folder or a GGUF file"
        if "trust_remote_code" in str(error):
            reason, remedy = "it needs its owner's code", "remote_code = true runs that, if you trust it"
        raise RecipeError(f"no tokenizer in {path!r} ({reason}); {remedy}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(f"the tokenizer in {path!r} runs only in Python; convert it to a tokenizer.json")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers while it loads: its advice, its weight report and its progress bars, which go to stderr.

    What matters of the report (weights that are missing) the caller asks for and raises.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the GGUF reader's bar knows no switch
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
