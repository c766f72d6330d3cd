"""The target's side of influence: target texts and the corpus's curvature become rows that an index is multiplied by.

    none         the mean of the target texts' projected gradients
    kfac, ekfac  the same of H^-1 g, with the curvature of a sample of the corpus's documents; full size, then projected
    trackstar    H^-1/2 on both sides, in the projected space; H mixed of the index's rows and the target's (TrackStar,
                 Chang et al. 2024, arXiv 2410.17413)

The rows are a file in the lake, so that scoring reads the index and this, and no model.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from scorers.base import Parameters
from scorers.influence.gradients import Document, GradientModel, projected
from scorers.influence.index import Gradients
from scorers.influence.projection import Projection
from scorers.lm.corpus import first_answer_token
from storage.errors import RecipeError

Preconditioner = Literal["none", "kfac", "ekfac", "trackstar"]
FILE = "target.safetensors"


class TargetTraining(Parameters):
    """How target texts become the rows that an index is multiplied by.

    preconditioner: what stands for the loss's inverse curvature (see the module). damping: what is added to its
    eigenvalues, over their mean. curvature_documents: of the index, by hash, from which the curvature is estimated.
    best_of: every target text keeps a row of its own and a document has its highest product, in place of the mean.
    """

    preconditioner: Preconditioner = "none"
    damping: Annotated[float, Field(gt=0)] = 0.1
    curvature_documents: Annotated[int, Field(ge=1)] = 1000
    best_of: bool = False


@dataclass(frozen=True)
class Aim:
    """rows: [n, d], float32. whitening: per layer its columns of a row and H^-1/2 [b, b] of them; None without it."""

    rows: NDArray[np.float32]
    whitening: tuple[tuple[slice, NDArray[np.float32]], ...] | None = None


def answered(model: GradientModel, prompts: list[str], texts: list[str]) -> list[Document | None]:
    """Texts after prompts, of which only the texts' tokens count in the loss."""
    documents: list[Document | None] = []
    for prompt, text in zip(prompts, texts, strict=True):
        if not prompt:
            documents += model.documents([text])
            continue
        encoding = model.lm.tokenizer.encode(prompt + text, add_special_tokens=False)
        targets = np.ones(len(encoding), np.bool_)
        targets[: first_answer_token(encoding, len(prompt))] = False
        documents.append(Document(np.array(encoding.ids, np.int64), targets))
    return documents


def train(training: TargetTraining, index: Gradients, texts: str, corpus: str, out: str, *, device: str) -> None:
    """Write `out`/target.safetensors and `out`/training.json.

    Args:
        index: the entry that will be asked, its model a path.
        texts: a Parquet file with the columns prompt and text.
        corpus: one with the column text, and for trackstar `gradient`; "" for the preconditioner "none".

    RecipeError: no target text has a token that counts, or a gradient is not finite.
    """
    model = index.load(device)
    projection = model.projection(index.projection, seed=index.seed, combine=index.combine)
    table = pq.read_table(texts, columns=["prompt", "text"])
    prompts = [prompt or "" for prompt in table.column("prompt").to_pylist()]
    documents = [d for d in answered(model, prompts, table.column("text").to_pylist()) if d and model.n_predicted(d)]
    if not documents:
        raise RecipeError("there is no target text with a token that the model predicts; give longer ones")
    aim = _aim(training, model, documents, projection, corpus)
    if not np.isfinite(aim.rows).all():
        raise RecipeError('the gradient of a target text is not finite; take dtype = "float32", or another model')
    folder = Path(f"{out}.part")
    folder.mkdir(parents=True, exist_ok=True)
    write_aim(aim, str(folder))
    record = {
        "trainer": "influence",
        "training": training.model_dump(mode="json"),
        "index": index.model_dump(mode="json"),
        "documents": len(documents),
        "texts_without_tokens": len(prompts) - len(documents),
        "tokens": sum(map(model.n_predicted, documents)),
        "layers": [layer.name for layer in model.layers],
        "dimensions": projection.dimensions,
        "layout": projection.layout,
        "libraries": {name: version(name) for name in ("torch", "transformers")},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    folder.rename(out)


def _aim(
    training: TargetTraining,
    model: GradientModel,
    documents: list[Document],
    projection: Projection,
    corpus: str,
) -> Aim:
    rows = projected(model, documents, projection)
    return Aim(rows if training.best_of else rows.mean(axis=0, keepdims=True))


def write_aim(aim: Aim, folder: str) -> None:
    """Keep the rows in a folder."""
    from safetensors.numpy import save_file

    arrays = {"rows": np.ascontiguousarray(aim.rows)}
    for number, (at, matrix) in enumerate(aim.whitening or ()):
        arrays |= {f"whitening.{number}": matrix, f"at.{number}": np.array([at.start, at.stop])}
    save_file(arrays, Path(folder, FILE))


def read_aim(folder: str) -> Aim:
    """What `write_aim` has left. RecipeError where it is no such folder."""
    from safetensors.numpy import load_file

    file = Path(folder, FILE)
    if not file.is_file():
        raise RecipeError(f'target: {folder!r} holds no target; name a [models.x] entry with trainer = "influence"')
    arrays = load_file(file)
    parts = [n for n in range(len(arrays)) if f"at.{n}" in arrays]
    whitening = tuple((slice(*arrays[f"at.{n}"].tolist()), arrays[f"whitening.{n}"]) for n in parts)
    return Aim(arrays["rows"], whitening or None)
