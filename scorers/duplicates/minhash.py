"""Duplicates: clusters of documents that are equal, or nearly so by MinHash and locality-sensitive hashing.

    signatures (a map, per document)   exact BIGINT, bands BIGINT[]     buckets: documents that share one are linked
    duplicates (a reduce, sparse)      cluster = smallest doc_id of the linked documents, cluster_size

MinHash: Broder 1997. A text is the set of its runs of `ngram` words; two texts with a share J of runs in common
(Jaccard) agree in a row of the signature with probability J, in a band of r rows with J^r, and in at least one of b
bands with 1 - (1 - J^r)^b: with 14 bands of 8 rows 5 % at J = 0.5, half at 0.69, 92 % at 0.8, 99.96 % at 0.9.
Annotated only: which copy is kept is decided in a mixture (`one_per`), among those that pass its filter.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from scorers import words
from scorers.base import MapSpec, ReduceSpec, Score, Space
from storage.schema import Column

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class DuplicateSignatures(MapSpec):
    """Buckets of a document: one for its exact text, one per band of its MinHash signature.

    The text is folded first: case folded, then NFC, every run of white space one space, none at the ends. `exact` is 64
    bits of XXH3 of it. The signature is of the folded text's words (scorers.words; symbols do not count), in runs of
    `ngram`; a text with fewer words is one single run, so only its equals are near it. The hash of a band covers its
    number, so equal numbers in different bands do not meet. Two different documents share a bucket by an accident of
    the 64 bits once in 10^17 pairs. A text of white space alone has NULL in both columns: it duplicates nothing.
    """

    scorer: Literal["duplicate_signatures"] = "duplicate_signatures"
    bands: Positive = 14
    rows: Positive = 8
    ngram: Positive = 5
    seed: Seed = 1

    libraries: ClassVar[tuple[str, ...]] = ("rensa",)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("exact", pa.int64(), "hash of the folded text; NULL without text"),
            Column("bands", pa.list_(pa.int64()), "hash of each band of the MinHash signature; NULL without text"),
        )

    def build(self, device: str = "cpu") -> Score:
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads; a worker has one core
        schema = pa.schema([(column.name, column.type) for column in self.columns])

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            texts = [_folded(text) for text in documents["text"].to_pylist()]
            exact = _exact(texts)
            empty = np.array([not text for text in texts], bool)
            bands = [self._bands(texts[part], exact[part]) for part in words.groups(texts)]
            flat = np.concatenate(bands).ravel() if bands else np.empty(0, np.uint64)
            offsets = np.arange(len(texts) + 1, dtype=np.int32) * self.bands
            return pa.record_batch(
                [
                    pa.array(exact.view(np.int64), mask=empty),
                    pa.ListArray.from_arrays(offsets, flat.view(np.int64), mask=pa.array(empty)),
                ],
                schema=schema,
            )

        return score

    def _bands(self, texts: Sequence[str], exact: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Band hashes, [texts, bands]."""
        from rensa import RMinHash

        shingles, offsets = self._shingles(texts, exact)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, self.bands * self.rows, self.seed)
        signature = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), self.bands, self.rows)
        hashes = words.mix(np.arange(1, self.bands + 1, dtype=np.uint64))[np.newaxis, :].repeat(len(texts), axis=0)
        for row in range(self.rows):
            hashes = words.mix(hashes + signature[:, :, row])
        return hashes

    def _shingles(
        self, texts: Sequence[str], exact: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Hashes of the runs of words, text after text, and where each text's begin (one more than texts)."""
        tokens = words.split(texts)
        word = np.flatnonzero(~tokens.symbol)
        hashes, text = tokens.hash[word], tokens.text[word]
        runs = max(len(word) - self.ngram + 1, 0)
        rolled = np.zeros(runs, np.uint64)
        for position in range(self.ngram):
            rolled = words.mix(rolled + hashes[position : position + runs])
        begins = text[:runs]
        whole = begins == text[self.ngram - 1 :]  # the run's words are all of one text
        rolled, begins = rolled[whole], begins[whole]

        counts = np.bincount(begins, minlength=len(texts))
        short = np.flatnonzero(counts == 0)
        rolled = np.insert(rolled, (np.cumsum(counts) - counts)[short], exact[short])
        counts[short] = 1
        return rolled, np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def _exact(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    from xxhash import xxh3_64_intdigest

    return np.array([xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)


class Duplicates(ReduceSpec):
    """The cluster of each document that has a duplicate: the connected components of "shares a bucket".

    Parameters are those of DuplicateSignatures. A document without a row is its own cluster of one. Extending an old
    result by new documents equals the full run exactly, as long as no document has left.
    """

    scorer: Literal["duplicates"] = "duplicates"
    bands: Positive = 14
    rows: Positive = 8
    ngram: Positive = 5
    seed: Seed = 1

    extends: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("cluster", pa.int64(), "smallest doc_id among the document and its duplicates"),
            Column("cluster_size", pa.int64(), "documents in the cluster", "documents"),
        )

    def maps(self) -> Mapping[str, MapSpec]:
        return {"signatures": DuplicateSignatures(bands=self.bands, rows=self.rows, ngram=self.ngram, seed=self.seed)}

    def defaults(self) -> Mapping[str, str]:
        return {"cluster": "doc_id", "cluster_size": "1"}

    def reduce(self, space: Space, *, extend: bool) -> pa.RecordBatchReader:
        buckets = "SELECT doc_id, unnest(list_prepend(exact, bands)) AS bucket FROM {} WHERE exact IS NOT NULL"
        everyone = buckets.format("signatures")
        if extend:  # two old documents in a bucket that nobody new is in are linked in `old` already
            everyone = f"SELECT * FROM ({everyone}) SEMI JOIN ({buckets.format('signatures_new')}) USING (bucket)"
        space.run(f"""
            CREATE OR REPLACE TEMP TABLE links AS
            SELECT DISTINCT doc_id, head
            FROM (SELECT doc_id, min(doc_id) OVER (PARTITION BY bucket) AS head FROM ({everyone}))
            WHERE doc_id <> head""")
        known = (
            "SELECT doc_id, cluster FROM old" if extend else "SELECT 0::BIGINT AS doc_id, 0::BIGINT AS cluster LIMIT 0"
        )
        space.run(f"""
            CREATE OR REPLACE TEMP TABLE members AS
            WITH known AS ({known}),
                 linked AS (SELECT doc_id FROM links UNION SELECT head FROM links)
            SELECT doc_id, cluster FROM known
            UNION ALL
            SELECT doc_id, doc_id FROM linked ANTI JOIN known USING (doc_id)""")
        space.run("""
            CREATE OR REPLACE TEMP TABLE edges AS
            SELECT DISTINCT a.cluster AS a, b.cluster AS b
            FROM links JOIN members a USING (doc_id) JOIN members b ON b.doc_id = links.head
            WHERE a.cluster <> b.cluster""")
        _contract(space)
        return space.read("""
            WITH sizes AS (SELECT cluster, count(*) AS cluster_size FROM members GROUP BY cluster)
            SELECT doc_id, cluster, cluster_size FROM members JOIN sizes USING (cluster) ORDER BY doc_id""")


def _contract(space: Space) -> None:
    """Merge the clusters of `members` that `edges` (a, b) join; each takes the smallest number of its component.

    Every node points at its smallest neighbour if that is smaller than itself, pointers are followed to their ends, the
    ends become the nodes of the next round. A node that is an end in two rounds on end has swallowed another one in
    the first, so every two rounds halve the nodes: a chain of a million takes a few rounds, not a million.
    """
    while _count(space, "SELECT count(*) FROM edges"):
        space.run("""
            CREATE OR REPLACE TEMP TABLE pointers AS
            SELECT node, least(node, min(neighbour)) AS target
            FROM (SELECT a AS node, b AS neighbour FROM edges UNION ALL SELECT b, a FROM edges)
            GROUP BY node""")
        while _count(
            space, "SELECT count(*) FROM pointers p JOIN pointers q ON q.node = p.target WHERE q.target < q.node"
        ):
            space.run("""
                CREATE OR REPLACE TEMP TABLE pointers AS
                SELECT p.node, q.target FROM pointers p JOIN pointers q ON q.node = p.target""")
        space.run("""
            CREATE OR REPLACE TEMP TABLE members AS
            SELECT doc_id, coalesce(target, cluster) AS cluster FROM members LEFT JOIN pointers ON node = cluster""")
        space.run("""
            CREATE OR REPLACE TEMP TABLE edges AS
            SELECT DISTINCT p.target AS a, q.target AS b
            FROM edges JOIN pointers p ON p.node = edges.a JOIN pointers q ON q.node = edges.b
            WHERE p.target <> q.target""")


def _count(space: Space, sql: str) -> int:
    count: int = space.read(sql).read_all().column(0)[0].as_py()
    return count
