"""fastText classifiers trained here: labelled texts in, a model file and its record out (Joulin et al. 2016).

The defaults are those with which DCLM, PreSelect and the perplexity correlations train (word bigrams, and fastText's
own else). What the library does, and what is done about it:

    one line is one text      the profile makes it one; it must be the one that the scorer uses, which reads the record
    __label__x in a text      would be learned as a label: such words are taken out, and counted
    threads                   update the weights without locks, so only one thread gives the same model again
    first weights             each thread fills a tenth of the matrix, and the rest is what the allocator hands out: NaN
                              at times. So the allocator is told to hand out zeros (glibc; elsewhere it mostly does)
"""

import contextlib
import ctypes
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from scorers.base import Parameters
from scorers.classifiers import fasttext_file
from scorers.classifiers.fasttext import LABEL, PROFILES, Profile
from scorers.classifiers.fasttext_mapped import Mapped
from storage.errors import RecipeError

END = "</s>"
"""The word that the library puts at the end of each line."""
M_PERTURB = -6
"""mallopt's parameter: memory is handed out filled with the complement of the low byte of its value."""


class FastTextTraining(Parameters):
    """How a fastText classifier is trained.

    profile: how a text becomes one line (see the scorer `fasttext`). dim: numbers per word and n-gram. epochs: passes
    over the texts. learning_rate: at the start; it falls to 0. word_ngrams: the longest run of words with a vector of
    its own. min_count: rarer words have none. buckets: vectors that the n-grams share by their hash; the file takes 4
    bytes x dim x (buckets + words). threads: more than one is faster, and gives another model each time.
    """

    profile: Profile = "plain"
    dim: Annotated[int, Field(ge=1)] = 100
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    word_ngrams: Annotated[int, Field(ge=1)] = 2
    min_count: Annotated[int, Field(ge=1)] = 1
    buckets: Annotated[int, Field(ge=1)] = 2_000_000
    threads: Annotated[int, Field(ge=1)] = 1

    libraries: ClassVar[tuple[str, ...]] = ("fasttext-numpy2-wheel",)


def train(training: FastTextTraining, texts: str, work: str, out: str, *, seed: int) -> None:
    """Train on the rows of `texts` that are not held out; write `out`/model.bin and `out`/training.json.

    Args:
        texts: a Parquet file with the columns label, text and heldout, in the order in which they are learned.
        work: a folder for what is made on the way. `out` appears as a whole, at the end.

    The record has per label the documents learned and held out, and on the latter `recall` (how many of the label get
    it as their likeliest), `precision` (how many that get it have it), `auroc` (of P(label) against all others, 1/2 is
    chance) and `length_auroc` (the same of the number of characters: what is to be beaten). NULL where one side is
    empty. RecipeError: no word is as frequent as min_count, or the weights overflow.
    """
    import fasttext

    begun = time.monotonic()
    lines = Path(work, "lines.txt")
    removed = _write_lines(training.profile, texts, lines)
    with _zeroed_memory():
        try:
            model = fasttext.train_supervised(
                str(lines),
                lr=training.learning_rate,
                dim=training.dim,
                epoch=training.epochs,
                wordNgrams=training.word_ngrams,
                minCount=training.min_count,
                bucket=training.buckets,
                thread=training.threads,
                seed=seed % 2**31,
                verbose=0,
            )
        except RuntimeError as error:
            raise RecipeError(f"learning_rate: {training.learning_rate:g} is too high ({error}); lower it") from error
    if not set(model.get_words()) - {END}:
        raise RecipeError(f"min_count: no word occurs {training.min_count} times; lower it")
    folder = Path(work, "out")
    folder.mkdir(exist_ok=True)
    model.save_model(str(folder / "model.bin"))
    learned = _counts(texts)
    record = {
        "trainer": "fasttext",
        "training": training.model_dump(mode="json"),
        "seed": seed,
        "documents": sum(learned.values()),
        "words": len(model.get_words()),
        "label_words_removed": removed,
        "labels": evaluate(str(folder / "model.bin"), texts, training.profile, learned),
        "seconds": round(time.monotonic() - begun, 1),
        "libraries": {name: version(name) for name in training.libraries},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    lines.unlink()
    folder.rename(out)


def evaluate(path: str, texts: str, profile: Profile, learned: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Per label what `train` puts on the record, of the rows of `texts` that are held out."""
    file, labels = fasttext_file.read(path), sorted(learned)
    model, places = Mapped(file), [file.labels.index(LABEL + label) for label in labels]
    truth: list[int] = []
    lengths: list[int] = []
    found = [np.empty((0, len(labels)))]
    for group in _groups(texts, heldout=True):
        found.append(model([PROFILES[profile](text) for _, text in group])[0][:, places].astype(float))
        truth += [labels.index(label) for label, _ in group]
        lengths += [len(text) for _, text in group]
    scores = np.concatenate(found)
    is_label, likeliest = np.array(truth, dtype=np.intp), scores.argmax(axis=1)
    found_of = {}
    for i, label in enumerate(labels):
        mine, called = is_label == i, likeliest == i
        found_of[label] = {
            "documents": learned[label],
            "held_out": int(mine.sum()),
            "recall": _share(called[mine]),
            "precision": _share(mine[called]),
            "auroc": auroc(scores[:, i], mine),
            "length_auroc": auroc(np.array(lengths, dtype=float), mine),
        }
    return found_of


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """Probability that a positive scores higher than another, ties one half; None where either side is empty."""
    there, others = int(positive.sum()), int((~positive).sum())
    if not there or not others:
        return None
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[which]
    return float((ranks[positive].sum() - there * (there + 1) / 2) / (there * others))


def _share(values: NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if values.size else None


def _write_lines(profile: Profile, texts: str, path: Path) -> int:
    """fastText's training file; returns how many words were taken out because they looked like labels."""
    removed = 0
    with path.open("w", encoding="utf-8") as file:
        for label, text in (row for group in _groups(texts, heldout=False) for row in group):
            line = PROFILES[profile](text)
            if LABEL in line:
                words = re.split("[ \t\n\r\v\f\0]+", line)  # as fastText splits
                kept = [word for word in words if not word.startswith(LABEL)]
                removed += len(words) - len(kept)
                line = " ".join(kept)
            file.write(f"{LABEL}{label} {line}\n")
    return removed


def _counts(texts: str) -> dict[str, int]:
    table = pq.read_table(texts, columns=["label", "heldout"])
    labels: Sequence[str] = table.column("label").unique().to_pylist()
    learned = table.filter(~table.column("heldout").to_numpy()).column("label").value_counts().to_pylist()
    return dict.fromkeys(labels, 0) | {row["values"]: row["counts"] for row in learned}


def _groups(texts: str, *, heldout: bool) -> Iterator[list[tuple[str, str]]]:
    """(label, text) of the rows that are held out, or of the others."""
    with pq.ParquetFile(texts) as file:
        for batch in file.iter_batches(batch_size=1024, columns=["label", "text", "heldout"]):
            rows = zip(*(batch.column(name).to_pylist() for name in ("label", "text", "heldout")), strict=True)
            yield [(label, text) for label, text, aside in rows if aside == heldout]


@contextlib.contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Memory comes filled with zeros, where the C library can be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_PERTURB, 0xFF)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
