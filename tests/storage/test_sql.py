"""The guard of the user's SQL: what is refused, what passes and really runs, and what the locked connection adds."""

import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import duckdb
import pytest
from duckdb_extensions import import_extension
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import QueryError
from storage.expressions import Scope, check_expression, check_order
from storage.sql import DENIED, DENIED_PREFIX, TABLE_FUNCTIONS, check_query, lock, nearest

RELATIONS = ("documents", "language", "tokens", "corpus")
MACROS = ("mixture",)


@pytest.fixture(scope="module")
def con():
    with duckdb.connect() as con:
        con.execute(
            "CREATE TABLE documents AS SELECT i AS doc_id, 'd' || i % 3 AS domain, 'some text ' || i AS text, "
            "1000 - i AS n_bytes, '{\"k\": [1, 2]}' AS metadata, DATE '2024-01-01' + i::INT AS crawled "
            "FROM range(50) t(i)"
        )
        con.execute("CREATE TABLE language AS SELECT doc_id, true AS computed, 'en' AS code FROM documents")
        con.execute("CREATE TABLE tokens AS SELECT doc_id, true AS computed, n_bytes // 4 AS n FROM documents")
        con.execute(
            "CREATE VIEW corpus AS SELECT d.*, l AS language, t AS tokens FROM documents d "
            "LEFT JOIN (SELECT * EXCLUDE doc_id, doc_id FROM language) l USING (doc_id) "
            "LEFT JOIN tokens t USING (doc_id)"
        )
        con.execute("CREATE MACRO mixture(name) AS TABLE SELECT doc_id, 1 AS copies FROM documents WHERE name = 'main'")
        yield con


HONEST = [
    "SELECT count(*) FROM documents",
    "FROM documents LIMIT 3",
    "select domain, sum(n_bytes) from DOCUMENTS group by all order by 2 desc;",
    "SELECT * EXCLUDE (text) REPLACE (n_bytes / 2 AS n_bytes) FROM documents",
    "SELECT COLUMNS('n_.*') FROM documents",
    "SELECT language.code, tokens.n FROM corpus WHERE tokens.n > 200",
    "SELECT d.domain, t.n FROM documents d JOIN tokens t USING (doc_id) WHERE t.computed",
    "WITH top AS (SELECT * FROM tokens ORDER BY n DESC LIMIT 5), two AS (FROM top LIMIT 2) SELECT sum(n) FROM two",
    "WITH documents AS (FROM documents WHERE doc_id < 5) SELECT count(*) FROM documents",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 9) SELECT max(x) FROM c",
    "WITH c AS MATERIALIZED (SELECT 1 AS x) SELECT * FROM c WHERE x IN (FROM c)",
    "SELECT domain FROM documents UNION SELECT code FROM language EXCEPT SELECT 'en' ORDER BY 1 LIMIT 2",
    "SELECT * FROM (SELECT row_number() OVER (PARTITION BY domain ORDER BY n_bytes) AS r FROM documents) WHERE r = 1",
    "SELECT n_bytes FROM documents WINDOW w AS (PARTITION BY domain ORDER BY n_bytes) QUALIFY rank() OVER w < 3",
    "VALUES (1, 'a'), (2, 'b')",
    "SELECT * FROM (VALUES (1), (2)) v(x), range(x) r(y)",
    "SELECT unnest([1, 2, 3]) AS x, generate_series(1, 2)",
    "FROM documents PIVOT (count(*) FOR domain IN ('d0', 'd1'))",
    "PIVOT documents ON domain IN ('d0', 'd1') USING sum(n_bytes)",
    "UNPIVOT (SELECT n_bytes, doc_id FROM documents) ON n_bytes, doc_id INTO NAME what VALUE much",
    "SELECT * FROM mixture('main') m JOIN documents USING (doc_id)",
    "SELECT e.value FROM documents, json_each(metadata->'k') e",
    "SELECT metadata->>'$.k[0]', json_extract(metadata, 'k') FROM documents",
    "SELECT count(*) FILTER (n_bytes > 990), quantile_cont(n_bytes, [0.1, 0.9]), list(DISTINCT domain) FROM documents",
    "SELECT domain FROM documents GROUP BY ROLLUP (domain) HAVING grouping(domain) = 0",
    "SELECT list_transform([1, 2], lambda x: x + 1), [x * 2 for x in [1, 2] if x > 1], {'a': 1}.a, MAP {'k': 1}['k']",
    "SELECT * FROM documents d WHERE EXISTS (FROM tokens t WHERE t.doc_id = d.doc_id AND t.n > 240)",
    "SELECT * FROM documents d, LATERAL (SELECT n FROM tokens t WHERE t.doc_id = d.doc_id)",
    "SELECT date_trunc('month', crawled), extract(year FROM crawled), crawled + INTERVAL 3 DAY FROM documents",
    "SELECT CASE WHEN n_bytes BETWEEN 1 AND 960 THEN 'a' ELSE 'b' END, coalesce(NULL, 1), n_bytes::INT FROM documents",
    "SELECT * FROM documents USING SAMPLE 3 ROWS",
    "SELECT text FROM documents WHERE text ILIKE '%TEXT 7' OR regexp_matches(text, '4$') -- the end",
    "DESCRIBE documents",
    "SELECT column_name FROM (DESCRIBE corpus)",
    "SUMMARIZE tokens",
    "SELECT $$it's /* no comment */ -- at all$$ AS x /* COPY x TO 'y' */",
    "SELECT 'FROM ''/etc/passwd''' AS \"read_text('x')\"",
    "SELECT avg(n) FROM tokens t ASOF JOIN documents d ON t.doc_id >= d.doc_id",
    "SELECT DISTINCT ON (domain) domain, text FROM documents ORDER BY domain, random()",
    "SELECT (SELECT max(n) FROM tokens) AS best, ARRAY(SELECT doc_id FROM documents) AS ids",
    "SELECT list_aggregate([1, 2], 'sum'), md5_number_upper(text), hash(text) FROM documents",
]


@pytest.mark.parametrize("sql", HONEST)
def test_honest_queries_pass_and_run(con, sql):
    check_query(sql, RELATIONS, MACROS)
    con.execute(sql).fetchall()


ATTACKS = [
    # files
    "SELECT * FROM 'x.parquet'",
    'SELECT * FROM "x.parquet"',
    "FROM '/etc/passwd'",
    "FROM 's3://bucket/x.parquet'",
    "FROM read_parquet('x.parquet')",
    "FROM read_text('/etc/passwd')",
    "FROM read_blob('/proc/self/environ')",
    "FROM ReAd_CsV('/etc/passwd', delim = ':')",
    "FROM \"read_csv\"('/etc/passwd')",
    "FROM read_json_auto($$/etc/x$$)",
    "FROM glob('/**')",
    "FROM sniff_csv('/etc/passwd')",
    "FROM read_duckdb('x.db')",
    "FROM parquet_metadata('x.parquet')",
    "DESCRIBE 'x.parquet'",
    "SUMMARIZE 'x.parquet'",
    "SELECT * FROM (SUMMARIZE 'x.parquet')",
    "SELECT * FROM documents, LATERAL (FROM read_text(documents.text))",
    "SELECT * FROM documents d JOIN read_csv('x') r ON true",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT 1 ORDER BY (SELECT count(*) FROM read_text('x'))",
    "SELECT 1 LIMIT (SELECT count(*) FROM read_text('x'))",
    "SELECT sum(1) FILTER (EXISTS (FROM 'x.csv'))",
    "SELECT sum(1) OVER (PARTITION BY (SELECT 1 FROM 'x.csv'))",
    "VALUES ((SELECT 1 FROM 'x.csv'))",
    "SELECT list_transform([1], lambda x: (SELECT x FROM 'x.csv'))",
    "SELECT * REPLACE ((SELECT 1 FROM 'x.csv') AS doc_id) FROM documents",
    "SELECT COLUMNS(lambda c: c = (SELECT 'a' FROM 'x.csv')) FROM documents",
    "SELECT 1 GROUP BY (SELECT 1 FROM 'x.csv')",
    "SELECT 1 FROM documents QUALIFY (SELECT true FROM 'x.csv')",
    "SELECT CASE WHEN (SELECT true FROM 'x.csv') THEN 1 END",
    "SELECT * FROM range((SELECT 3 FROM 'x.csv'))",
    "FROM (FROM 'x.csv') PIVOT (count(*) FOR a IN ('b'))",
    "SELECT 1 UNION ALL (SELECT 2 UNION ALL FROM 'x.csv')",
    "FROM documents JOIN language ON (SELECT true FROM 'x.csv')",
    "SELECT 1 = ANY (FROM 'x.csv')",
    "SELECT /* FROM documents */ * FROM--\n'x.csv'",
    # Python's variables, other catalogs, the catalog itself
    "FROM some_dataframe",
    "FROM information_schema.tables",
    "FROM pg_catalog.pg_class",
    "FROM pg_class",
    "FROM sqlite_master",
    "FROM duckdb_tables",
    "FROM duckdb_tables()",
    "FROM duckdb_settings()",
    "FROM duckdb_secrets()",
    "FROM pragma_table_info('documents')",
    "FROM pragma_version()",
    "FROM __ducklake_metadata_lake.ducklake_table",
    "FROM lake.main.documents",
    "FROM main.documents",
    'FROM "lake"."documents"',
    "FROM shards",
    "FROM documents AT (VERSION => 1)",
    "FROM documents AT (TIMESTAMP => now())",
    "SHOW TABLES",
    "SHOW ALL TABLES",
    "SHOW DATABASES",
    "SELECT * FROM (SHOW TABLES)",
    "SHOW TABLES FROM lake",
    "SELECT 'x'::lake.main.kind",
    "SELECT doc_id::lake.main.kind[] FROM documents",
    # SQL in strings, functions that write
    "FROM query('COPY documents TO ''x''')",
    "FROM query_table('x.csv')",
    "FROM histogram_values(secret, a)",
    "FROM json_execute_serialized_sql('{}')",
    "FROM sqlite_scan('catalog.sqlite', 't')",
    "FROM sqlite_query('lake', 'x')",
    "FROM ducklake_snapshots('lake')",
    "FROM ducklake_cleanup_old_files('lake', cleanup_all => true)",
    "FROM ducklake_delete_orphaned_files('lake')",
    "FROM ducklake_expire_snapshots('lake')",
    "FROM force_checkpoint('lake')",
    "FROM enable_logging(storage = 'file')",
    "FROM system.main.duckdb_settings()",
    "FROM mixture((SELECT 'x'))",
    "FROM mixture(getenv('HOME'))",
    "FROM documents, mixture(documents.domain)",
    "SELECT getenv('HOME')",
    "SELECT \"GETENV\"('HOME')",
    "SELECT system.main.getenv('HOME')",
    "SELECT main.getenv('HOME')",
    "SELECT ('HOME').getenv()",
    "SELECT list_transform(['HOME'], lambda x: getenv(x))",
    "SELECT current_setting('temp_directory')",
    "SELECT getvariable('x')",
    "SELECT nextval('s')",
    "SELECT write_log('x')",
    "SELECT sleep_ms(100000)",
    "SELECT pg_sleep(1000)",
    "SELECT setseed(0.5)",
    "SELECT json_serialize_plan('FROM read_csv(''/etc/passwd'')')",
    "SELECT pg_get_viewdef(1)",
    "SELECT __internal_decompress_string(1::UBIGINT)",
    "SELECT no_such_extension_function(1)",
    "SELECT getenv('HOME') OVER () FROM documents",
    # CTEs that lend their name to a table
    "WITH sqlite_master AS (FROM sqlite_master) FROM sqlite_master",
    "WITH a AS (FROM secret), secret AS (SELECT 1) FROM a",
    "WITH RECURSIVE secret AS (FROM secret) FROM secret",
    "WITH RECURSIVE secret AS (FROM secret UNION ALL SELECT 1) FROM secret",
    "SELECT * FROM (WITH secret AS (SELECT 1) FROM secret), secret",
    "WITH a AS (WITH secret AS (SELECT 1) FROM secret) FROM a, secret",
    "WITH secret AS (SELECT 1) FROM main.secret",
    "WITH RECURSIVE c(n) USING KEY (n) AS (SELECT 1 UNION SELECT 2 FROM recurring.c) FROM c",
    # not one SELECT
    "COPY documents TO 'x'",
    "COPY (SELECT 1) TO '/tmp/x'",
    "ATTACH 'x.db'",
    "DETACH lake",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA version",
    "PRAGMA table_info('documents')",
    "SET threads = 1",
    "RESET threads",
    "CREATE TABLE t AS SELECT 1",
    "CREATE TEMP VIEW documents AS SELECT 666",
    "INSERT INTO documents VALUES (1)",
    "DELETE FROM documents",
    "UPDATE documents SET text = ''",
    "DROP TABLE documents",
    "CALL pragma_version()",
    "EXPORT DATABASE 'x'",
    "IMPORT DATABASE '/tmp'",
    "CHECKPOINT",
    "BEGIN",
    "USE memory",
    "VACUUM",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE SELECT 1",
    "MERGE INTO documents USING tokens USING (doc_id) WHEN MATCHED THEN DELETE",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY documents TO 'x'",
    "SELECT 1 /* ; */; DROP TABLE documents --",
    "PIVOT documents ON domain USING count(*)",
    "SELECT $1",
    "SELECT ? FROM documents",
    "SELECT $name",
    "SELECT DEFAULT",
    "",
    "-- nothing",
    ";",
    "SELECT 1\0; DROP TABLE documents",
    "SELECT '\ud800'",
    "SELECT " + "[" * 900 + "]" * 900,
]


@pytest.mark.parametrize("sql", ATTACKS)
def test_attacks_are_refused(sql):
    with pytest.raises(QueryError) as refused:
        check_query(sql, RELATIONS, MACROS)
    assert "syntax error" not in str(refused.value), "this attack is no SQL and shows nothing"


@pytest.mark.parametrize(
    "sql",
    [
        "WITH c AS (COPY documents TO 'x') FROM c",
        "WITH c AS (DELETE FROM documents RETURNING *) FROM c",
        "SELECT * INTO t FROM documents",
        "SELECT * FROM documents FOR UPDATE",
        "SELECT * FROM ('x.parquet')",
        "SELECT 'abc",
        "SELECT 1 /* open",
        "ＳＥＬＥＣＴ 1",
        "SELECT " + "NOT " * 3000 + "true",
    ],
)
def test_what_duckdb_cannot_parse_is_refused_in_its_words(sql):
    with pytest.raises(QueryError):
        check_query(sql, RELATIONS)


def test_a_cte_never_lends_its_name_to_a_table():
    """Law: what passes reads no table but the allowed ones, so it runs where `secret` does not exist."""
    places = [
        "SELECT * FROM {x}",
        "SELECT (SELECT count(*) FROM {x})",
        "SELECT 1 WHERE EXISTS (FROM {x})",
        "SELECT 1 ORDER BY (SELECT count(*) FROM {x})",
        "SELECT 1 LIMIT (SELECT count(*) FROM {x})",
        "SELECT 1 UNION ALL SELECT 2 FROM {x}",
        "SELECT 1 UNION SELECT 2 ORDER BY (SELECT 1 FROM {x})",
        "SELECT 1 FROM documents GROUP BY (SELECT 1 FROM {x})",
        "SELECT count(*) FROM documents HAVING EXISTS (FROM {x})",
        "SELECT 1 FROM documents JOIN {x} ON true",
        "SELECT 1 FROM documents d, LATERAL (SELECT d.a FROM {x})",
        "SELECT 1 FROM documents JOIN documents e ON EXISTS (FROM {x})",
        "SELECT sum(a) OVER (ORDER BY (SELECT 1 FROM {x})) FROM documents",
        "SELECT sum(a) FILTER (EXISTS (FROM {x})) FROM documents",
        "SELECT DISTINCT ON ((SELECT 1 FROM {x})) a FROM documents",
        "SELECT * FROM range((SELECT 1 FROM {x}))",
        "SELECT * FROM (VALUES ((SELECT 1 FROM {x})))",
        "SELECT * FROM {x} PIVOT (count(*) FOR a IN (1))",
        "SELECT * FROM (DESCRIBE {x})",
        "DESCRIBE {x}",
        "WITH inner1 AS (FROM {x}) FROM inner1",
        "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT r.a + 1 FROM r, {x} WHERE r.a < 3) FROM r",
        "WITH RECURSIVE r AS (SELECT 1 AS a FROM {x} UNION ALL SELECT a + 1 FROM r WHERE a < 3) FROM r",
    ]
    around = [
        "{q}",
        "WITH secret AS (SELECT 1 AS a) {q}",
        "WITH secret AS ({q}) FROM secret",
        "WITH RECURSIVE secret AS ({q}) FROM secret",
        "WITH RECURSIVE secret AS ((SELECT 1 AS a) UNION ALL (SELECT 1 FROM ({q}) LIMIT 1)) SELECT 1 FROM secret",
        "WITH RECURSIVE secret AS ((SELECT 1 FROM ({q})) UNION ALL (FROM secret LIMIT 0)) SELECT 1 FROM secret",
        "WITH first AS ({q}), secret AS (SELECT 1 AS a) FROM first",
        "WITH secret AS (SELECT 1 AS a), second AS ({q}) FROM second",
        "SELECT * FROM (WITH secret AS (SELECT 1 AS a) FROM secret) s, ({q}) t",
        "FROM ({q}) t UNION ALL BY NAME (WITH secret AS (SELECT 1 AS a) FROM secret)",
        "(WITH secret AS (SELECT 1 AS a) FROM secret) UNION ALL BY NAME ({q})",
        "WITH secret AS (SELECT 1 AS a) SELECT * FROM ({q}) t",
        "WITH outer1 AS (WITH secret AS (SELECT 1 AS a) {q}) FROM outer1",
    ]
    passed = refused = 0
    with duckdb.connect() as con:
        con.execute("CREATE TABLE documents AS SELECT 1 AS a")
        for place, frame in product(places, around):
            sql = frame.format(q=place.format(x="secret"))
            try:
                check_query(sql, ("documents",))
            except QueryError:
                refused += 1
                continue
            passed += 1
            try:
                con.execute(f"PREPARE bound AS {sql}")  # looks up every name, runs nothing
            except duckdb.BinderException:
                pass  # wrong in another way, and no table was looked for in vain
            except duckdb.CatalogException as error:
                pytest.fail(f"reads a table: {sql}: {error}")
    assert passed > 80
    assert refused > 80


def test_errors_name_the_remedy():
    def message(sql):
        with pytest.raises(QueryError) as refused:
            check_query(sql, RELATIONS, MACROS)
        return str(refused.value)

    assert "did you mean 'documents'?; FROM can name corpus, documents" in message("FROM document")
    assert "COPY is not a query; write one SELECT: to write files, use an export" in message(
        "/* x */ copy documents TO 'x'"
    )
    assert "write mixture('main')" in message("FROM mixture(1)")
    assert "did you mean 'mixture'?" in message("FROM mixtur('main')")
    assert "did you mean 'lower'?" in message("SELECT lowr('A')")
    assert "PIVOT needs its values" in message("PIVOT documents ON domain USING count(*)")
    assert "(line 2, column 6)" in message("SELECT 1\nFROM , documents")
    assert message("SELECT 'éé', 1 +").endswith("(line 1, column 17)")
    assert "write documents" in message("FROM main.documents")
    assert nearest("languge", ["language", "tokens"]) == "; did you mean 'language'?"
    assert nearest("zzz", ["language"]) == ""


def test_every_function_of_this_duckdb_was_seen():
    """A new DuckDB brings new functions: decide on each (DENIED or not), then write it into functions.txt."""
    with duckdb.connect() as con:
        rows = con.execute(
            "SELECT DISTINCT function_type, lower(function_name) FROM duckdb_functions() "
            "WHERE function_type <> 'pragma'"
        ).fetchall()
    present = {f"{kind} {name}" for kind, name in rows}
    assert present == set(Path(__file__).with_name("functions.txt").read_text().splitlines())
    names = {name for _, name in rows}
    assert DENIED - names == {"getenv"}  # only DuckDB's shell has it
    assert names >= TABLE_FUNCTIONS
    for name in DENIED | {name for name in names if name.startswith(DENIED_PREFIX)}:
        with pytest.raises(QueryError):
            check_query(f'SELECT "{name}"(1)', ())


def test_many_threads_check_at_once():
    failed = []

    def work():
        for _ in range(20):
            try:
                check_query(HONEST[7], RELATIONS)
            except QueryError as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


SCOPE = Scope(
    documents=("doc_id", "domain", "text", "n_bytes", "metadata", "crawled_at"),
    entries={
        "language": ("computed", "code", "probability"),
        "gopher": ("computed", "word_count", "Signals"),
        "tokens": ("computed", "n"),
    },
)


@pytest.mark.parametrize(
    ("sql", "references", "null_tests"),
    [
        ("n_bytes > 10", [(None, "n_bytes")], []),
        ("LANGUAGE.Code = 'en' AND Domain <> 'x'", [(None, "domain"), ("language", "code")], []),
        ("\"language\".\"code\" IN ('en', 'de')", [("language", "code")], []),
        ("gopher.signals.top_ngram.x > 1", [("gopher", "Signals")], []),
        ("gopher.word_count IS NULL", [("gopher", "word_count")], ["gopher"]),
        ("NOT (gopher.word_count IS NOT NULL)", [("gopher", "word_count")], ["gopher"]),
        ("coalesce(tokens.n, n_bytes) > 1", [(None, "n_bytes"), ("tokens", "n")], ["tokens"]),
        ("ifnull(tokens.n + 1, 2) > 1", [("tokens", "n")], ["tokens"]),
        ("nullif(tokens.n, 0) > 1", [("tokens", "n")], []),
        ("language.code IS DISTINCT FROM 'en'", [("language", "code")], ["language"]),
        ("(tokens.n > 1) IS TRUE", [("tokens", "n")], ["tokens"]),
        ("greatest(tokens.n, 3) > 1 AND language.code = 'a'", [("language", "code"), ("tokens", "n")], ["tokens"]),
        ("CASE WHEN tokens.n > 1 THEN 2 ELSE 0 END", [("tokens", "n")], ["tokens"]),
        ("text IS NULL", [(None, "text")], []),
        ("tokens.computed AND tokens.n IS NULL", [("tokens", "computed"), ("tokens", "n")], []),
        ("metadata->>'k' = 'x'", [(None, "metadata")], []),
        ("len(list_filter([1, 2], lambda text: text > n_bytes)) > 0", [(None, "n_bytes")], []),
        ("[x for x in [1, 2] if x > tokens.n][1]", [("tokens", "n")], ["tokens"]),
        ("-- longer texts\nn_bytes > 10 -- that is all", [(None, "n_bytes")], []),
        (
            "crawled_at < DATE '2025-01-01' AND age(crawled_at, DATE '2020-01-01') > INTERVAL 1 DAY",
            [(None, "crawled_at")],
            [],
        ),
    ],
)
def test_expressions_name_what_they_read(sql, references, null_tests):
    expression = check_expression(sql, SCOPE)
    assert expression.references == tuple(references)
    assert expression.null_tests == tuple(null_tests)
    # It stands anywhere: in a longer condition, on one line.
    check_query(
        f"SELECT 1 AS x FROM documents, gopher, language, tokens WHERE {expression.sql} AND 1 = 1",
        [*SCOPE.entries, "documents"],
    )


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("", "empty"),
        ("n_byte > 1", "did you mean 'n_bytes'?"),
        ("code = 'en'", "did you mean language.code?"),
        ("langage.code = 'en'", "did you mean 'language.code'?"),
        ("language.cde = 'en'", "did you mean 'code'?; it has computed, code, probability"),
        ("language = 'en'", "language.computed, language.code, language.probability"),
        ("computed", "language.computed or gopher.computed"),
        ("1) , (2", "syntax error"),
        ("1, 2", "one expression"),
        ("1 FROM x --", "one expression"),
        ("1 FROM documents", "one expression"),
        ("1) --", "syntax error"),
        ("1) + (1", "syntax error"),
        ("true) OR (true", "syntax error"),
        ("true) OR (true --", "syntax error"),
        ("true /*", "unterminated"),
        ("true; DROP TABLE documents", "one SELECT"),
        ("true WHERE false", "one expression"),
        ("true ORDER BY 1", "one expression"),
        ("true LIMIT 1", "one expression"),
        ("true UNION SELECT 1", "one expression"),
        ("DISTINCT text", "one expression"),
        ("text AS x", "syntax error"),
        ("text x", "syntax error"),
        ("x: text", "syntax error"),
        ("SELECT 1", "syntax error"),
        ("(SELECT 1)", "no subqueries"),
        ("doc_id IN (FROM documents)", "no subqueries"),
        ("EXISTS (FROM 'x.csv')", "no subqueries"),
        ("count(*) > 1", "aggregate"),
        ("sum(n_bytes)", "aggregate"),
        ("rank() OVER ()", "no window functions"),
        ("*", "no stars"),
        ("COLUMNS('n.*')", "no stars"),
        ("language.*", "no stars"),
        ("#1", "no positions"),
        ("$1", "no parameters"),
        ("unnest([1])", "several rows"),
        ("GROUPING(text)", "no GROUPING"),
        ("text.lower()", "write lower(...)"),
        ("random() < 0.5", "changes from run to run"),
        ("crawled_at > now()", "changes from run to run"),
        ("crawled_at > current_date", "no column 'current_date'"),
        ("current_date() > crawled_at", "changes from run to run"),
        ("age(crawled_at) > INTERVAL 1 DAY", "changes from run to run"),
        ("ago(INTERVAL 1 DAY) > crawled_at", "changes from run to run"),
        ("getenv('HOME') = 'x'", "not allowed"),
        ("list_transform([1], lambda x: getenv('x'))", "not allowed"),
        ("list_transform([1], 3 -> nope)", "no column 'nope'"),
        ("documents.text = 'x'", "no column 'documents.text'"),
    ],
)
def test_expressions_that_are_refused(sql, words):
    with pytest.raises(QueryError) as refused:
        check_expression(sql, SCOPE)
    assert words in str(refused.value)


@given(
    st.lists(
        st.sampled_from(
            ["1", "(", ")", "--", "\n", "/*", "*/", "'", ",", ";", " FROM documents", " AS x", "text", " + ", "$$"]
        )
    )
)
def test_what_passes_is_one_expression_in_any_place(pieces):
    try:
        expression = check_expression("".join(pieces), SCOPE)
    except QueryError:
        return
    with duckdb.connect() as con:
        con.execute("CREATE TABLE documents AS SELECT 1 AS doc_id, '7' AS text")
        for sql in (f"SELECT {expression.sql}, 2 FROM documents", f"SELECT [{expression.sql}], 2 FROM documents"):
            try:
                result = con.execute(sql)
            except (duckdb.ConversionException, duckdb.BinderException):
                continue  # a type error in an expression that is one all the same
            assert len(result.description) == 2


def test_order_tells_its_direction():
    assert check_order("tokens.n DESC", SCOPE) == (check_expression("tokens.n", SCOPE), True)
    assert check_order("tokens.n\n asc", SCOPE) == (check_expression("tokens.n", SCOPE), False)
    assert check_order("tokens.N", SCOPE)[1] is None
    assert check_order("(n_bytes)desc", SCOPE)[0].sql == "((n_bytes))"
    assert check_order("n_bytes -- not desc", SCOPE)[1] is None
    for bad in (
        "n_bytes, text",
        "n_bytes DESC NULLS FIRST",
        "ALL",
        "n_bytes DESC LIMIT 1",
        "",
        "1 DESC) --",
        "sum(n_bytes) DESC",
    ):
        with pytest.raises(QueryError):
            check_order(bad, SCOPE)


ATTACH = (
    "ATTACH 'ducklake:sqlite:{d}/catalog.sqlite' AS lake (DATA_PATH '{d}/data/', META_JOURNAL_MODE 'WAL', "
    "META_BUSY_TIMEOUT 10000, DATA_INLINING_ROW_LIMIT 0{ro})"
)
WRITER = """
import sys
import duckdb
from duckdb_extensions import import_extension
con = duckdb.connect()
import_extension("ducklake", con=con)
import_extension("sqlite_scanner", con=con)
con.execute(sys.argv[1])
for i in range(1, 6):
    path = f"{sys.argv[2]}/data/main/documents/s{i}.parquet"
    con.execute(f"COPY (SELECT range + {i * 100} AS doc_id, 'text' AS text FROM range(100)) TO '{path}'")
    con.execute(f"CALL ducklake_add_data_files('lake', 'documents', '{path}')")
    print(i, flush=True)
"""


def attached(folder: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    import_extension("ducklake", con=con)
    import_extension("sqlite_scanner", con=con)
    con.execute(ATTACH.format(d=folder, ro=", READ_ONLY" if read_only else ""))
    con.execute("USE lake")
    return con


@pytest.fixture
def lake(tmp_path):
    """A lake of one registered file, and the connection of a reader, locked."""
    folder = tmp_path / "lake"
    shard = folder / "data" / "main" / "documents" / "s0.parquet"
    shard.parent.mkdir(parents=True)
    with attached(folder, read_only=False) as con:
        con.execute("CREATE TABLE documents (doc_id BIGINT, text VARCHAR)")
        con.execute(f"COPY (SELECT range AS doc_id, 'text' AS text FROM range(100)) TO '{shard}'")
        con.execute(f"CALL ducklake_add_data_files('lake', 'documents', '{shard}')")
        con.execute("CREATE VIEW corpus AS SELECT *, {'n': doc_id} AS tokens FROM documents")
        con.execute("CREATE MACRO mixture(name) AS TABLE SELECT doc_id FROM documents WHERE name = 'main'")
    with attached(folder, read_only=True) as con:
        lock(con, f"{folder}/data/")
        yield folder, con


def test_a_locked_connection_reads_the_lake_and_nothing_else(lake, tmp_path):
    folder, con = lake
    for sql, answer in {
        "SELECT count(*) FROM documents": 100,
        "SELECT sum(tokens.n) FROM corpus": 4950,
        "SELECT count(*) FROM mixture('main')": 100,
        "SELECT count(DISTINCT d.text || r) FROM documents d, range(1000) t(r)": 1000,
    }.items():
        check_query(sql, ("documents", "corpus"), ("mixture",))
        assert con.execute(sql).fetchone() == (answer,)
    secret = tmp_path / "secret.csv"
    secret.write_text("secret,1\n")
    frame = con.sql("SELECT 1 AS a").arrow()
    assert frame is not None
    for sql in (
        f"FROM read_text('{secret}')",
        f"FROM '{secret}'",
        f"FROM read_text('{folder}/data/../../secret.csv')",
        "FROM glob('/etc/*')",
        f"COPY documents TO '{tmp_path}/out.csv'",
        f"ATTACH '{tmp_path}/new.db'",
        "FROM read_csv('https://example.com/x.csv')",
        "FROM frame",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "DELETE FROM documents",
        "DROP TABLE documents",
    ):
        with pytest.raises(duckdb.Error):
            con.execute(sql)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lake", "secret.csv"]


def test_the_lock_alone_is_not_enough(lake):
    """Why check_query exists: these do harm on the locked, read-only connection, and the guard refuses them."""
    folder, con = lake
    shard = f"{folder}/data/main/documents/s0.parquet"
    for sql in (
        f"FROM sqlite_scan('{folder}/catalog.sqlite', 'ducklake_table')",
        f"COPY (SELECT 1 AS a) TO '{shard}'",
        f"ATTACH '{folder}/data/new.db' AS other",
    ):
        with pytest.raises(QueryError):
            check_query(sql, ("documents",))
        con.execute(sql).fetchall()
    assert duckdb.sql(f"SELECT count(*) FROM '{shard}'").fetchone() == (1,)


def test_a_locked_connection_spills(tmp_path):
    with duckdb.connect(config={"memory_limit": "60MB", "threads": 1}) as con:
        lock(con, str(tmp_path / "it's"))
        sql = "SELECT count(*) FROM (SELECT i, repeat('x', 40) || i AS s FROM range(1200000) t(i) ORDER BY s)"
        assert con.execute(sql).fetchone() == (1_200_000,)
        spill = Path(con.execute("SELECT current_setting('temp_directory')").fetchone()[0])
    assert not spill.exists()


def test_a_locked_connection_sees_what_another_process_commits(lake):
    folder, con = lake
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, ATTACH.format(d=folder, ro=""), str(folder)], stdout=subprocess.PIPE
    )
    counts = []
    while writer.poll() is None:
        counts += con.execute("SELECT count(*) FROM documents").fetchone()
    assert writer.communicate()[0].split() == [b"1", b"2", b"3", b"4", b"5"]
    assert counts == sorted(counts)
    assert all(count % 100 == 0 for count in counts)
    assert con.execute("SELECT count(*) FROM documents").fetchone() == (600,)
