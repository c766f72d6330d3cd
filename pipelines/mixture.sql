-- What a mixture means, in SQL. Words in braces are filled in from the recipe; nothing else changes between runs.

-- [candidates] per shard, over `rows`: the documents with one struct per entry
-- `draw` and `held` are uniform in [0, 1) and hang on the content and the seed alone: no random state, no order.
SELECT
    doc_id,
    coalesce(CAST({group} AS VARCHAR), '(none)') AS "group",
    CAST({tokens} AS BIGINT) AS tokens,
    CASE
        WHEN {where} IS FALSE THEN 'where'
        {missing}
    END AS dropped,
    {cluster} AS cluster,
    {clustered} AS clustered,
    {prefer} AS prefer,
    CAST({copies} AS DOUBLE) AS curve,
    {best}
    {flags}
    (md5_number_upper(text_hash || ':' || {seed}) >> 11) / 9007199254740992.0 AS draw,
    (md5_number_upper(text_hash || ':holdout:' || {seed}) >> 11) / 9007199254740992.0 AS held
FROM {rows}

-- [missing] of one expression that a candidate needs: without a value it is dropped, or refused where it was not scored
WHEN {value} IS NULL THEN CASE WHEN {scored} THEN 'null' ELSE 'unscored' END

-- [missing_or_kept] the same, where a document that was not scored is to be kept
WHEN {value} IS NULL AND ({scored}) THEN 'null'

-- [cut] over all candidates: where the good end of one column begins, so that `fraction` of them is at least as good
SELECT {sign}quantile_disc({sign}{column}, {fraction}) AS cut FROM candidates WHERE dropped IS NULL

-- [within] over `evaluated`: candidates beyond a cut are dropped
SELECT * REPLACE (CASE WHEN dropped IS NULL AND NOT ({inside}) THEN 'best' ELSE dropped END AS dropped) FROM evaluated

-- [choices] over the rows that need them: one per cluster among the candidates, and the holdout of whole clusters
WITH clustered AS (SELECT * FROM candidates WHERE clustered AND cluster IS NOT NULL),
keys AS (SELECT cluster, arg_min(held, draw) AS held FROM clustered GROUP BY cluster),
ranked AS (
    SELECT
        doc_id,
        cluster,
        row_number() OVER best_first AS place,
        first_value(doc_id) OVER best_first AS winner
    FROM clustered
    WHERE dropped IS NULL
    WINDOW best_first AS (PARTITION BY cluster ORDER BY prefer {direction} NULLS LAST, doc_id)
)
SELECT
    doc_id,
    CASE WHEN place > 1 THEN 'duplicate' WHEN held < {holdout} THEN 'holdout' END AS choice,
    CASE WHEN place > 1 THEN winner END AS instead
FROM ranked JOIN keys USING (cluster)
ORDER BY doc_id

-- [totals] per group what there is to take, over `chosen`: the candidates after all choices
SELECT "group", count(*) AS documents, CAST(sum(tokens) AS BIGINT) AS tokens, sum(tokens * curve) AS curved
FROM chosen WHERE dropped IS NULL GROUP BY "group" ORDER BY "group"

-- [chosen] per shard or over all: candidates with what the choices dropped
SELECT
    c.* EXCLUDE (dropped),
    CASE
        WHEN c.dropped IS NOT NULL THEN c.dropped
        WHEN h.doc_id IS NOT NULL THEN h.choice
        WHEN c.held < {holdout} THEN 'holdout'
    END AS dropped,
    h.instead
FROM candidates c LEFT JOIN choices h ON c.doc_id = h.doc_id

-- [draw] per shard: taken floor(expected) times, and once more where the draw is below the fraction
SELECT
    doc_id,
    c."group",
    tokens,
    CASE WHEN dropped IS NULL THEN coalesce(epochs, 0.0) * curve ELSE 0.0 END AS expected,
    CAST(floor(expected) + CASE WHEN draw < expected - floor(expected) THEN 1 ELSE 0 END AS INTEGER) AS copies,
    CASE
        WHEN dropped IS NOT NULL THEN dropped
        WHEN coalesce(epochs, 0.0) = 0 THEN 'no_weight'
        WHEN expected = 0 THEN 'copies'
        WHEN copies = 0 THEN 'draw'
    END AS dropped,
    instead
FROM chosen c LEFT JOIN epochs e ON c."group" = e."group"
ORDER BY doc_id
