"""The vocabulary's reductions and the measures: worked examples, the plain definitions, rows at the edge."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.lm import definitions as define
from scorers.lm import statistics
from scorers.lm.statistics import Statistic, token_statistics

ALL: tuple[Statistic, ...] = ("log_prob", "entropy", "z_score", "el2n", "rank")

# Five tokens over a vocabulary of four; the second row is uniform.
LOGITS = torch.tensor([[2, 1, 0, -1], [0.5] * 4, [3, 0, 0, 0], [0, 1, 2, 3], [1, -1, 2, 0]])
TARGETS = torch.tensor([0, 3, 1, 3, 0])
LOG_PROBS = [-0.440190, -1.386294, -3.139206, -0.440190, -1.440190]
MU = [-0.947537, -1.386294, -0.529061, -0.947537, -0.947537]
VARIANCE = [0.616586, 0, 1.017577, 0.616586, 0.616586]
Z = [0.646113, 0, -2.587504, 0.646113, -0.627399]
EL2N = [0.437644, 0.866025, 1.294596, 0.437644, 1.002794]


def found(logits: torch.Tensor, targets: torch.Tensor) -> dict[Statistic, np.ndarray]:
    return dict(zip(ALL, token_statistics(logits, targets, ALL).numpy(), strict=True))


def plain(logits: torch.Tensor, targets: torch.Tensor) -> dict[Statistic, np.ndarray]:
    """The definitions, on whole rows in float64."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    lp = log_p.gather(1, targets[:, None])[:, 0]
    mu = (p * log_p).sum(-1)
    sigma = ((p * log_p**2).sum(-1) - mu**2).sqrt()
    error = p - torch.nn.functional.one_hot(targets, logits.shape[1])
    rank = (logits > logits.gather(1, targets[:, None])).sum(-1)
    values = (lp, -mu, (lp - mu) / sigma, error.norm(dim=-1), rank)
    return {name: value.numpy() for name, value in zip(ALL, values, strict=True)}


def test_worked_example_of_a_token() -> None:
    told = found(LOGITS, TARGETS)
    np.testing.assert_allclose(told["log_prob"], LOG_PROBS, atol=1e-6)
    np.testing.assert_allclose(told["entropy"], np.negative(MU), atol=1e-6)
    np.testing.assert_allclose(told["z_score"], Z, atol=1e-5)
    np.testing.assert_allclose(told["el2n"], EL2N, atol=1e-6)
    np.testing.assert_array_equal(told["rank"], [0, 0, 1, 0, 1])
    uneven = np.array(VARIANCE) > 0
    sigma = (told["log_prob"] + told["entropy"])[uneven] / told["z_score"][uneven]
    np.testing.assert_allclose(sigma**2, np.array(VARIANCE)[uneven], rtol=1e-5)


def test_worked_example_of_min_k() -> None:
    log_probs = found(LOGITS, TARGETS)["log_prob"]
    for k, expected in ((0.2, -3.139206), (0.4, -2.289698), (0.6, -1.988563), (1.0, -1.369214)):
        assert define.min_k(log_probs, k) == pytest.approx(expected, abs=1e-6)
    assert define.min_k(log_probs, 0.1) == pytest.approx(-3.139206, abs=1e-6)  # less than one token: one is taken
    assert define.min_k(np.linspace(-100, -1, 100, dtype=np.float32), 0.29) == -86  # 29, whatever 0.29 * 100 is
    assert define.nats_per_token(log_probs) == pytest.approx(1.369214, abs=1e-6)
    assert define.nats(log_probs) == pytest.approx(6.846070, abs=1e-5)
    assert define.bits_per_byte(log_probs, 10) == pytest.approx(6.846070 / 10 / math.log(2), abs=1e-6)
    assert define.bits_per_byte(log_probs, 0) is None


def test_worked_example_of_min_k_plus_plus() -> None:
    rows = [0, 2, 3, 4]  # without the uniform one
    z = found(LOGITS[rows], TARGETS[rows])["z_score"]
    for k, expected in ((0.25, -2.587504), (0.5, -1.607452), (1.0, -0.480669)):
        assert define.min_k(z, k) == pytest.approx(expected, abs=1e-5)


def test_worked_example_of_el2n() -> None:
    assert define.mean(found(LOGITS, TARGETS)["el2n"]) == pytest.approx(0.807741, abs=1e-6)


def test_worked_example_of_zlib() -> None:
    text = "The quick brown fox jumps over the lazy dog."
    assert define.compressed_bytes(text) == len(zlib.compress(text.encode()))
    assert define.zlib_ratio(np.float32(LOG_PROBS), 51) == pytest.approx(-1.369214 / 51, rel=1e-6)


def test_worked_example_of_salt() -> None:
    log_probs = -np.float32([0.2, 1.5, 0.9, 6.0, 2.5, 0.1])
    ranks = np.float32([0, 9, 2, 10, 5, 0])  # the fourth is the eleventh likeliest
    assert define.top_k_rank_loss(log_probs, ranks, 10, "drop") == pytest.approx(0.9)
    assert define.top_k_rank_loss(log_probs, ranks, 10, "zero") == pytest.approx(0.55)
    for outside in ("drop", "zero"):
        assert define.top_k_rank_loss(log_probs, ranks + 10, 10, outside) is None


def test_quantiles_and_lower_case() -> None:
    log_probs = -np.float32([3, 1, 2, 5, 4])
    assert [define.loss_quantile(log_probs, q) for q in (0, 0.1, 0.5, 1)] == pytest.approx([1, 1.4, 3, 5])
    assert define.lowercase_ratio(log_probs, log_probs * 2) == 2
    assert define.lowercase_ratio(np.zeros(3, np.float32), log_probs) is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 1.0, 10.0]), st.integers(2, 3000))
def test_statistics_are_the_plain_definitions(seed: int, spread: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, vocabulary, generator=generator) * spread + 50 * torch.randn(20, 1, generator=generator)
    targets = torch.randint(vocabulary, (20,), generator=generator)
    targets[:10] = logits[:10].argmax(1)
    told, wanted = found(logits, targets), plain(logits, targets)
    for name in ("log_prob", "entropy", "el2n"):
        np.testing.assert_allclose(told[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(told["rank"], wanted["rank"])
    if spread >= 0.1:
        even = ~np.isfinite(wanted["z_score"])
        near = np.abs(wanted["log_prob"]) < 1e-4  # a sigma that float64 itself has lost
        np.testing.assert_allclose(
            told["z_score"][~even & ~near], wanted["z_score"][~even & ~near], rtol=1e-4, atol=1e-4
        )


def test_only_what_is_wanted_in_the_order_asked() -> None:
    whole = found(LOGITS, TARGETS)
    for wanted in (
        ("log_prob",),
        ("rank", "log_prob"),
        ("el2n",),
        ("log_prob", "z_score"),
        ("entropy", "rank"),
        ALL[::-1],
    ):
        values = token_statistics(LOGITS, TARGETS, wanted)
        assert values.shape == (len(wanted), 5)
        for name, row in zip(wanted, values, strict=True):
            np.testing.assert_allclose(row, whole[name], rtol=1e-6, atol=1e-7)
    assert token_statistics(LOGITS[:0], TARGETS[:0], ALL).shape == (5, 0)


def test_rows_at_the_edge() -> None:
    inf = math.inf
    rows = torch.tensor([
        [0.5, 0.5, 0.5, 0.5],  # uniform
        [40.0, -60.0, -60.0, -60.0],  # one-hot, on the target
        [40.0, -60.0, -60.0, -60.0],  # one-hot, on another
        [2.0, 1.0, -inf, -inf],  # half of the vocabulary masked
        [7.0, -inf, -inf, -inf],  # all but the target
        [3e38, -3e38, -3e38, -3e38],
    ])  # fmt: skip
    told = found(rows, torch.tensor([2, 0, 1, 0, 0, 0]))
    for values in told.values():
        assert np.isfinite(values).all()
    assert told["z_score"][[0, 4, 5]].tolist() == [0, 0, 0]
    assert told["z_score"][1] == pytest.approx(0, abs=1e-6)
    assert told["z_score"][2] < -1e6
    np.testing.assert_allclose(
        told["el2n"], [math.sqrt(0.75), 0, math.sqrt(2), math.sqrt(2) / (1 + math.e), 0, 0], atol=1e-6
    )
    np.testing.assert_allclose(told["entropy"], [math.log(4), 0, 0, 0.582203, 0, 0], atol=1e-6)
    masked = plain(rows[3:4, :2], torch.tensor([0]))
    for name in ALL:
        assert told[name][3] == pytest.approx(masked[name][0], rel=1e-5)
    assert found(rows[3:4], torch.tensor([3]))["log_prob"] == -inf  # the document is NULL


def test_bfloat16_is_reduced_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(30, 5000, generator=generator) * 3).bfloat16()
    targets = torch.randint(5000, (30,), generator=generator)
    told, wanted = found(logits, targets), plain(logits, targets)
    for name in ALL:
        np.testing.assert_allclose(told[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
    uniform = found(torch.full((1, 50_000), 1.7, dtype=torch.bfloat16), torch.tensor([5]))
    assert uniform["z_score"] == 0


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(30, 100, generator=generator), torch.randint(100, (30,), generator=generator)
    before = logits.clone()
    whole = token_statistics(logits, targets, ALL)
    monkeypatch.setitem(statistics.ROWS, "cpu", 700)
    torch.testing.assert_close(token_statistics(logits, targets, ALL), whole)
    assert logits.equal(before)
