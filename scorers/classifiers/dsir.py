"""DSIR: data selection via importance resampling (Xie et al., NeurIPS 2023, arXiv 2302.03169).

    features (a map, per document)   ngrams USMALLINT[]: the bucket of each n-gram (scorers.classifiers.hashed_ngrams)
    dsir (a reduce)                  log_weight = sum over the n-grams of  ln p_target(bucket) - ln p_raw(bucket)

p_raw is the share of each bucket among all n-grams of the corpus, p_target that in the target file, both plus 1e-8
before the logarithm, as the authors have it. Taking the largest of log_weight + Gumbel noise is drawing documents one
after the other without replacement, in proportion to their weights (Vieira 2014). The noise hangs on the text and the
seed, so `order_by = "dsir.gumbel"` draws the same documents on every machine.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from scorers.base import FilePath, MapSpec, ReduceSpec, Space
from scorers.classifiers.hashed_ngrams import Buckets, HashedNgrams, Hasher, Order
from storage.errors import RecipeError, SourceError
from storage.schema import Column
from storage.sources import Source
from storage.sources.jsonl import read_jsonl
from storage.sources.pool import Mapping as Fields
from storage.sources.records import Reject
from storage.sources.streams import Input

TargetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]

FLOOR = 1e-8
"""Added to both probabilities: an n-gram whose bucket the target lacks costs about 18 nats."""
LONGEST = 1 << 30
"""Bytes of a target text."""
TEXTS = 1024
"""Target texts counted at once."""
EMPTY = "targets: {path!r} has no word to match; name a file with texts"


class DSIR(ReduceSpec):
    """Log importance weight of each document, for the n-gram distribution of the target against the corpus's own.

    targets: a file of JSON lines with a field `text` (plain, gzip, zstd or LZ4), or several, { name = "file" }.
    ngram, buckets: the features; the defaults are the authors'.
    pseudo_count: Laplace's, added to each bucket of the target; it spares a small target the price of FLOOR. Several
        targets need it: without it the one with more text is nearly always the likeliest.
    per: "document" sums over the n-grams, as the authors do; weights then span thousands of nats and long documents
        are far below short ones (never take the exponential). "token" divides by n_tokens: no importance weight any
        more, but it compares documents of different lengths.
    seed: of the noise.

    Columns, high is good:
        log_weight   nats (nats/token where `per` says so). NULL for a text without a token, to which the authors give
                     0, which can be the largest of all
        gumbel       log_weight plus standard Gumbel noise (1.3 nats), hashed from text_hash and seed; equal texts share
                     theirs. Beside weights that are thousands of nats apart it decides little
        n_tokens     the authors' length; they select from `dsir.n_tokens >= 100`
    With several targets also log_weight_<name> of each, and `target`: the name of the likeliest, whose weight and noise
    log_weight and gumbel are. A mixture that groups by `dsir.target` and orders by `dsir.gumbel` gives each target its
    share; unlike the authors' separate_targets, which go one after the other, a document stands for its likeliest only.

    All n-grams are counted, where the authors stop at 10^9 of the corpus. Every document counts in p_raw, so a new one
    changes all weights: the reduce runs in full, in seconds where the features are there, and so it does when targets
    change. A `where` restricts the corpus that p_raw is of. RecipeError for a target without n-grams.
    """

    scorer: Literal["dsir"] = "dsir"
    targets: FilePath | Mapping[TargetName, FilePath]
    ngram: Order = 2
    buckets: Buckets = 10_000
    pseudo_count: Annotated[float, Field(ge=0)] = 0.0
    per: Literal["document", "token"] = "document"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 1

    @property
    def columns(self) -> tuple[Column, ...]:
        nats = "nats" if self.per == "document" else "nats/token"
        told = "ln of the importance weight" if self.per == "document" else "ln of the importance weight over n_tokens"
        common = (
            Column("log_weight", pa.float64(), told, nats, higher_is_better=True),
            Column("gumbel", pa.float64(), "log_weight plus Gumbel noise", nats, higher_is_better=True),
            Column("n_tokens", pa.int64(), "runs of letters and digits, or of neither", "tokens"),
        )
        if isinstance(self.targets, str):
            return common
        each = (
            Column(f"log_weight_{name}", pa.float64(), f"{told} for {name}", nats, higher_is_better=True)
            for name in self.targets
        )
        return (*common, Column("target", pa.string(), "the target of the largest log_weight"), *each)

    def problems(self) -> list[str]:
        """Also looks at the first record of each target, since the others are read after the whole corpus."""
        problems = super().problems()
        if not self.targets:
            problems.append("targets: names no file; give one, or { name = FILE }")
        for path in self._paths().values() if not problems else ():
            try:
                if next(_texts(path), None) is None:
                    problems.append(EMPTY.format(path=path))
            except RecipeError as error:
                problems += error.problems
        return problems

    def maps(self) -> Mapping[str, MapSpec]:
        return {"features": HashedNgrams(ngram=self.ngram, buckets=self.buckets)}

    def defaults(self) -> Mapping[str, str]:
        return dict.fromkeys((column.name for column in self.columns), "NULL")

    def reduce(self, space: Space, *, extend: bool) -> pa.RecordBatchReader:
        raw = self._raw(space)
        paths = self._paths()
        hasher = Hasher(self.ngram, self.buckets)
        for name, path in paths.items():
            ratios = log_ratios(raw, _counts(path, hasher), self.pseudo_count).tolist()
            space.run(f"SET VARIABLE ratios_{name} = CAST('[{', '.join(map(repr, ratios))}]' AS DOUBLE[])")
        # As a column of every row it is there once; inside the lambda DuckDB would copy it for every few n-grams.
        lists = ", ".join(f"getvariable('ratios_{name}') AS ratios_{name}" for name in paths)
        over = " / n_tokens" if self.per == "token" else ""
        each_ratio = "list_transform(ngrams, lambda b: ratios_{}[b + 1])"
        weights = ", ".join(f"list_sum({each_ratio.format(name)}){over} AS {_column(name)}" for name in paths)
        each = ", ".join(map(_column, paths))
        names = ", ".join(f"'{name}'" for name in paths)
        likeliest = f"CASE WHEN log_weight IS NOT NULL THEN [{names}][list_position([{each}], log_weight)] END"
        target = "" if isinstance(self.targets, str) else f", {likeliest} AS target, {each}"
        # Of order k there are k - 1 fewer n-grams than tokens, or none. This is the authors' length.
        length = f"(len(ngrams) + {self.ngram * (self.ngram - 1) // 2}) // {self.ngram}"
        # 52 bits and a half: neither 0 nor 1.
        uniform = f"((md5_number_upper(text_key || ':gumbel:{self.seed}') >> 12) + 0.5) / {1 << 52}"
        return space.read(f"""
            WITH counted AS (
                SELECT doc_id, ngrams, CASE WHEN len(ngrams) > 0 THEN {length} ELSE 0 END AS n_tokens,
                       -ln(-ln({uniform})) AS noise, {lists}
                FROM features),
            weighed AS (SELECT doc_id, n_tokens, noise, {weights} FROM counted),
            best AS (SELECT *, greatest({each}) AS log_weight FROM weighed)
            SELECT doc_id, log_weight, log_weight + noise AS gumbel, n_tokens{target} FROM best ORDER BY doc_id""")

    def _paths(self) -> Mapping[str, str]:
        """The target files by name; a single one has none."""
        return {"": self.targets} if isinstance(self.targets, str) else self.targets

    def _raw(self, space: Space) -> npt.NDArray[np.int64]:
        """n-grams of the corpus in each bucket, [buckets]."""
        found = space.read("""
            SELECT bucket, count(*) AS n FROM (SELECT unnest(ngrams) AS bucket FROM features) GROUP BY bucket""")
        table = found.read_all()
        counts = np.zeros(self.buckets, np.int64)
        counts[table.column("bucket").to_numpy()] = table.column("n").to_numpy()
        return counts


def log_ratios(
    raw: npt.NDArray[np.int64], target: npt.NDArray[np.int64], pseudo_count: float = 0.0
) -> npt.NDArray[np.float64]:
    """ln p_target - ln p_raw of each bucket in nats, from the counts of n-grams; all are [buckets]."""
    p_target = (target + pseudo_count) / (target.sum() + pseudo_count * len(target))
    p_raw = raw / max(1, raw.sum())  # a corpus without n-grams has no document to weigh either
    ratios: npt.NDArray[np.float64] = np.log(p_target + FLOOR) - np.log(p_raw + FLOOR)
    return ratios


def _column(target: str) -> str:
    return f"log_weight_{target}"


def _counts(path: str, hasher: Hasher) -> npt.NDArray[np.int64]:
    """n-grams of a target file in each bucket, [buckets]."""
    counts = np.zeros(hasher.buckets, np.int64)
    waiting: list[str] = []
    for text in _texts(path):
        waiting.append(text)
        if len(waiting) == TEXTS:
            counts += np.bincount(hasher(waiting)[1], minlength=hasher.buckets)
            waiting = []
    counts += np.bincount(hasher(waiting)[1], minlength=hasher.buckets)
    if not counts.any():
        raise RecipeError(EMPTY.format(path=path))
    return counts


def _texts(path: str) -> Iterator[str]:
    fields = Fields(Source(name="targets", format="jsonl", path=path), LONGEST)
    try:
        file = Input(path)
    except SourceError as error:
        raise RecipeError(f"targets: {path!r} cannot be read ({error.detail}); name a file of JSON lines") from None
    with file:
        for number, record in enumerate(read_jsonl(file, fields, LONGEST), 1):
            if not isinstance(record, Reject):
                yield record.text.decode()
            elif record.reason != "empty":
                told = f"{record.reason} {record.detail or ''}".strip()
                raise RecipeError(
                    f"targets: record {number} of {path!r} is no object with a string `text` ({told}); mend the file"
                )
