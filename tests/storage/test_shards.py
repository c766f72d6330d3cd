"""Shards that stand beside each other are read some rows at a time, all of them at the same rows."""

from pathlib import Path

import pyarrow as pa
import pytest

from storage import shards
from storage.errors import SchemaError
from storage.shards import read_beside, read_shard, write_shard


def write(folder: Path, name: str, rows: int, group: int, width: int = 0) -> str:
    columns = {"doc_id": range(rows), "n": [[row] * (row % 3) for row in range(rows)]}
    table = pa.table(columns | ({"bytes": [bytes([row % 256]) * width for row in range(rows)]} if width else {}))
    return write_shard(str(folder), name, "a", table.to_batches(), table.schema, group).path


@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
@pytest.mark.parametrize("piece", [1, 700, 3000, 2**25])
def test_pieces_are_the_whole_at_the_same_rows(tmp_path, monkeypatch, rows, piece):
    monkeypatch.setattr(shards, "PIECE", piece)
    asked = [(write(tmp_path, "one", rows, 9), ["n", "doc_id"]), (write(tmp_path, "two", rows, 64, 20), ["bytes"])]
    pieces = list(read_beside(str(tmp_path), asked))
    assert all(one.num_rows == two.num_rows for one, two in pieces)
    assert len(pieces) == {1: max(rows, 1), 2**25: 1}.get(piece, len(pieces))
    for (path, columns), found in zip(asked, zip(*pieces, strict=True), strict=True):
        assert pa.concat_tables(found).equals(read_shard(str(tmp_path), path, columns).select(columns))


def test_shards_of_other_lengths_are_refused(tmp_path):
    paths = [(write(tmp_path, name, rows, 4), ["doc_id"]) for name, rows in (("one", 8), ("two", 9))]
    with pytest.raises(SchemaError, match="not equally many rows"):
        next(read_beside(str(tmp_path), paths))
