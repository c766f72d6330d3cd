"""A reduce without a lake: its maps as Arrow tables."""

import duckdb
import pyarrow as pa


class DuckSpace:
    """A space on a DuckDB in memory (one for all tests: a new one takes longer than a test), counting statements."""

    connection = duckdb.connect()

    def __init__(self, **tables: pa.Table) -> None:
        self.statements = 0
        for name, table in tables.items():
            self.connection.register(name, table)

    def run(self, sql: str) -> None:
        self.statements += 1
        self.connection.execute(sql)

    def read(self, sql: str) -> pa.RecordBatchReader:
        return self.connection.execute(sql).to_arrow_reader()
