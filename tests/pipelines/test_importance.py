"""DSIR over a lake: fitted to all of it, drawn by a mixture that takes the best of the noisy weights."""

import pytest

WORDS = {"mill": "the wheel grinds barley slowly", "mine": "iron and copper ore under the hill"}
TEXTS = [f"{text} number {n} of {name}" for n in range(20) for name, text in WORDS.items()]


@pytest.fixture
def targeted(job):
    for name, text in WORDS.items():
        job.write(f"{name}.jsonl", [text])
    return job


def dsir(job, **more) -> dict:
    return job.recipe(scores={"dsir": {"scorer": "dsir", "targets": "mill.jsonl", **more}})


def weights(job) -> dict[str, float]:
    return dict(job.ask("SELECT text, dsir.log_weight FROM corpus"))


def test_new_documents_change_all_weights_and_only_they_are_read(targeted):
    job = targeted
    job.write("pool/a.jsonl", TEXTS[:30])
    job.run(dsir(job))
    before = weights(job)
    job.write("pool/b.jsonl", TEXTS[30:])
    counts = job.run(dsir(job)).counts
    assert counts["dsir_features"]["computed"] == 10
    assert not counts["dsir"]["extended"]
    after = weights(job)
    assert all(after[text] != before[text] for text in before)
    fresh = job.elsewhere("fresh")
    fresh.run(dsir(job))
    assert weights(fresh) == after
    fresh.lake.close()
    assert job.run(dsir(job)).counts["dsir"]["reused"]


def test_another_target_reads_no_text_again(targeted):
    job = targeted
    job.write("pool/a.jsonl", TEXTS)
    job.run(dsir(job))
    counts = job.run(dsir(job, targets="mine.jsonl")).counts
    assert counts["dsir_features"]["computed"] == 0
    best = job.ask("SELECT text FROM corpus ORDER BY dsir.log_weight DESC LIMIT 20")
    assert {text.rpartition(" ")[2] for (text,) in best} == {"mine"}
    job.write("mine.jsonl", ["the wheel"])
    assert not job.run(dsir(job, targets="mine.jsonl")).counts["dsir"]["reused"]


def test_where_says_what_the_corpus_is(targeted):
    job = targeted
    job.write("pool/a.jsonl", TEXTS)
    mills = [text for text in TEXTS if "mill" in text]
    job.run(dsir(job, where="text LIKE '%mill'"))
    found = job.ask("SELECT text, dsir.log_weight FROM corpus WHERE dsir.computed")
    assert sorted(text for text, _ in found) == sorted(mills)
    assert job.ask("SELECT count(dsir.n_tokens) FROM corpus") == [(len(mills),)]
    job.write("pool/a.jsonl", mills)
    fresh = job.elsewhere("fresh")
    fresh.run(dsir(job))
    assert weights(fresh) == dict(found)
    fresh.lake.close()


def test_a_mixture_draws_the_best_of_the_noisy_weights(targeted):
    job = targeted
    job.write("pool/a.jsonl", [*TEXTS, "barley", " "])
    drawn = {"tokens": "dsir.n_tokens", "budget_tokens": 80, "order_by": "dsir.gumbel", "where": "dsir.n_tokens >= 8"}
    job.run(dsir(job) | {"mixtures": {"drawn": drawn}})
    taken = job.ask("SELECT text FROM mixture('drawn') ORDER BY doc_id")
    expected = job.ask("SELECT text, dsir.n_tokens FROM corpus WHERE dsir.n_tokens >= 8 ORDER BY dsir.gumbel DESC")
    fits, room = [], 80
    for text, tokens in expected:
        room -= tokens
        if room < 0:
            break
        fits.append(text)
    assert sorted(text for (text,) in taken) == sorted(fits)
    assert 5 <= len(fits) < len(expected)


def test_each_target_gets_its_share(targeted):
    job = targeted
    job.write("pool/a.jsonl", TEXTS)
    recipe = dsir(job, targets={name: f"{name}.jsonl" for name in WORDS}) | {
        "weights": {"shares": {"method": "given", "group_by": "dsir.target", "share": {"mill": 0.75, "mine": 0.25}}},
        "mixtures": {
            "drawn": {
                "tokens": "n_bytes",
                "budget_tokens": 800,
                "weights": "shares",
                "group_by": "dsir.target",
                "order_by": "dsir.gumbel",
            }
        },
    }
    job.run(recipe)
    taken = dict(job.ask("SELECT \"group\", sum(tokens) FROM mixture('drawn') GROUP BY 1"))
    longest = max(map(len, TEXTS))
    assert 600 - longest < taken["mill"] <= 600
    assert 200 - longest < taken["mine"] <= 200
