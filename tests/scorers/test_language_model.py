"""Language-model scores: against transformers' own loss, against a computation by hand, and against themselves."""

import json
import math
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scorers.lm import forward
from scorers.lm.forward import CausalLM
from scorers.lm.measures import LanguageModel, Measure
from scorers.lm.statistics import Statistic
from scorers.lm.tokenizer import load_tokenizer
from scorers.lm.windows import batch_size, windows
from storage.errors import RecipeError, ShardError

SENTENCE = "The miller's water wheel turns slowly, and the naïve 🎉 stones grind 1,234 sacks of barley. "
TEXTS = ["", "a", "é", "🎉", SENTENCE, SENTENCE[:20], "Ελληνικά", SENTENCE * 4, "to be or not to be", SENTENCE[5:60]]
POSITIONS = 256


@pytest.fixture(scope="module")
def rust() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE.encode("ascii", "ignore").decode()], trainer)
    return tokenizer


def save(folder: Path, model: Any, rust: Tokenizer, *, bos: bool) -> str:
    tokenizer = Tokenizer.from_str(rust.to_str())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def llama(rust: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rust.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,  # wide, so that what a token predicts depends on what it saw
            bos_token_id=0,
            eos_token_id=1,
        )
    )


@pytest.fixture(scope="module")
def llama_dir(rust: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Relative positions, and a tokenizer that puts a BOS before and an EOS after a text."""
    return save(tmp_path_factory.mktemp("llama"), llama(rust), rust, bos=True)


@pytest.fixture(scope="module")
def gpt2_dir(rust: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Absolute positions, and a tokenizer without special tokens."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=rust.get_vocab_size(),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return save(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel(config), rust, bos=False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_dir"))


def score(spec: LanguageModel, texts: list[str]) -> dict[str, list[Any]]:
    batch = pa.record_batch({"doc_id": range(len(texts)), "text": pa.array(texts, pa.large_string())})
    scores = spec.build()(batch)
    assert scores.schema == pa.schema([pa.field(c.name, c.type) for c in spec.columns])
    return scores.to_pydict()


def reference(path: str, ids: list[int]) -> np.ndarray:
    """Log-probabilities of ids[1:] by a bare forward of the full logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


ALL: tuple[Measure, ...] = ("nats_per_token", "bits_per_byte", "n_tokens", "min_k")


def test_mean_loss_is_transformers_own(model_dir: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_dir)(SENTENCE, return_tensors="pt").input_ids
    ids = ids[:, : -1 if "llama" in model_dir else None]  # the EOS is no part of the text
    loss = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()(ids, labels=ids).loss.item()
    scores = score(LanguageModel(model=model_dir, measures=ALL), [SENTENCE])
    assert scores["nats_per_token"][0] == pytest.approx(loss, rel=1e-5)
    assert scores["n_tokens"] == [ids.shape[1] - 1]


def test_a_text_scores_alone_as_in_any_company(model_dir: str) -> None:
    spec = LanguageModel(model=model_dir, measures=get_args(Measure), context=64)
    together, reversed_ = score(spec, TEXTS), score(spec, TEXTS[::-1])
    build = spec.build()
    for number, text in enumerate(TEXTS):
        alone = build(pa.record_batch({"text": [text]})).to_pylist()[0]
        for name, value in alone.items():
            for other in (together[name][number], reversed_[name][-1 - number]):
                assert other == (value if value is None else pytest.approx(value, rel=1e-4)), (text, name)


def test_windows_of_a_long_text_equal_a_computation_by_hand(gpt2_dir: str, llama_dir: str, rust: Tokenizer) -> None:
    ids = rust.encode(SENTENCE * 4).ids[:41]
    # no BOS: windows of 16 advance by 8; the first predicts 1..15, each later one its last 8
    expected = [reference(gpt2_dir, ids[:16])]
    expected += [reference(gpt2_dir, ids[s : s + 16])[7:] for s in (8, 16, 24)]
    expected += [reference(gpt2_dir, ids[32:41])[-1:]]
    text = rust.decode(ids)
    assert rust.encode(text).ids == ids
    [found] = CausalLM(gpt2_dir, context=16, bos=None)([text])
    assert found.log_probs.size == 40
    np.testing.assert_allclose(found.log_probs, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    # with a BOS before every window: 15 tokens of text each, advancing by 8
    expected = [reference(llama_dir, [0, *ids[:15]])]
    expected += [reference(llama_dir, [0, *ids[s : s + 15]])[7:] for s in (8, 16, 24)]
    expected += [reference(llama_dir, [0, *ids[32:41]])[7:]]
    [found] = CausalLM(llama_dir, context=16, bos=None)([text])
    assert found.log_probs.size == 41
    np.testing.assert_allclose(found.log_probs, np.concatenate(expected), rtol=1e-4, atol=1e-5)


def test_sequences_of_fixed_length(gpt2_dir: str, llama_dir: str, rust: Tokenizer) -> None:
    """stride = context: with a BOS each stands alone; without one its first token is the last of the one before."""
    ids = rust.encode(SENTENCE * 4).ids[:41]
    text = rust.decode(ids)
    expected = [reference(llama_dir, [0, *ids[s : s + 15]]) for s in (0, 15, 30)]
    [found] = CausalLM(llama_dir, context=16, stride=16)([text])
    np.testing.assert_allclose(found.log_probs, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    expected = [reference(gpt2_dir, ids[s : s + 16]) for s in (0, 15, 30)]
    [found] = CausalLM(gpt2_dir, context=16, stride=16)([text])
    np.testing.assert_allclose(found.log_probs, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    for stride in (0, 17):
        with pytest.raises(RecipeError, match="not between 1 and the context, 16"):
            CausalLM(llama_dir, context=16, stride=stride)


@given(n=st.integers(0, 300), width=st.integers(2, 40), stride=st.integers(1, 60), first=st.integers(0, 1))
def test_each_token_is_predicted_once_with_the_rest_of_a_window_before_it(
    n: int, width: int, stride: int, first: int
) -> None:
    cut = list(windows(0, n, width, stride, first))
    assert [t for w in cut for t in range(w.first, w.stop)] == list(range(first, n))
    assert all(0 < w.stop - w.start <= width and w.start + first <= w.first < w.stop <= n for w in cut)
    assert all(w.first - w.start == max(width - stride, first) for w in cut[1:])
    assert len(cut) <= 1 or n > width


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=200), st.sampled_from([64, 1024, 8192]))
def test_padding_is_bounded(lengths: list[int], tokens: int) -> None:
    lengths.sort(reverse=True)
    begin = 0
    while begin < len(lengths):
        batch = lengths[begin : begin + batch_size(lengths, begin, tokens)]
        places = len(batch) * batch[0]
        assert batch
        assert len(batch) == 1 or places <= tokens
        assert places - sum(batch) <= 0.05 * places or places <= tokens / 32
        begin += len(batch)


def test_what_cannot_be_computed_is_null(gpt2_dir: str, llama_dir: str) -> None:
    without = score(LanguageModel(model=gpt2_dir, measures=ALL), ["", "a"])
    assert without == {
        "nats_per_token": [None, None],
        "bits_per_byte": [None, None],
        "n_tokens": [0, 0],
        "min_k": [None, None],
    }
    with_bos = score(LanguageModel(model=llama_dir, measures=ALL), ["", "a"])
    assert with_bos["n_tokens"] == [0, 1]
    assert with_bos["nats_per_token"][0] is None
    assert with_bos["min_k"][1] == pytest.approx(-with_bos["nats_per_token"][1])
    assert score(LanguageModel(model=llama_dir, measures=ALL), [])["n_tokens"] == []


def test_bos_is_the_tokenizers_habit_unless_the_recipe_says_otherwise(llama_dir: str, gpt2_dir: str) -> None:
    n = {bos: score(LanguageModel(model=llama_dir, measures=ALL, bos=bos), [SENTENCE]) for bos in (None, True, False)}
    assert n[None] == n[True]
    assert n[False]["n_tokens"][0] == n[True]["n_tokens"][0] - 1
    with pytest.raises(RecipeError, match="no BOS token"):
        CausalLM(gpt2_dir, bos=True)


def test_bytes_are_those_of_the_predicted_tokens(gpt2_dir: str, llama_dir: str, rust: Tokenizer) -> None:
    for text in TEXTS:
        [tokens] = CausalLM(llama_dir, bos=None).tokenize([text])
        assert tokens.n_bytes == len(text.encode())
    first = CausalLM(gpt2_dir, bos=None)
    assert len(rust.encode("é").ids) == 2  # one character, two tokens: it counts whole with the second
    assert [first.tokenize([text])[0].n_bytes for text in ("", "a", "aé", "é", "🎉b")] == [0, 0, 2, 2, 5]
    [found] = first([SENTENCE])
    assert found.n_bytes == len(SENTENCE.encode()) - len(rust.decode(rust.encode(SENTENCE).ids[:1]))
    scores = score(LanguageModel(model=gpt2_dir, measures=ALL), [SENTENCE])
    nats = scores["nats_per_token"][0] * scores["n_tokens"][0]
    assert scores["bits_per_byte"][0] == pytest.approx(nats / math.log(2) / found.n_bytes, rel=1e-6)


EVERY: tuple[Measure, ...] = get_args(Measure)


def plainly(path: str, text: str, *, k: float = 0.2, top_k: int = 100) -> dict[str, float]:
    """Every measure of a text of one window as its definition says, from whole rows of logits in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def rows(text: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        ids = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        skipped = ids["offset_mapping"][0][1] if "gpt2" in path else 0
        given = torch.tensor([[*([] if "gpt2" in path else [0]), *ids["input_ids"]]])
        with torch.inference_mode():
            return model(given).logits[0, :-1].double().log_softmax(-1), given[0, 1:], len(text[skipped:].encode())

    log_p, targets, n_bytes = rows(text)
    p, lp = log_p.exp(), log_p.gather(1, targets[:, None])[:, 0]
    mu = (p * log_p).sum(-1)
    z = (lp - mu) / ((p * log_p**2).sum(-1) - mu**2).sqrt()
    n = max(1, int(k * len(lp)))
    low_p, low_targets, _ = rows(text.lower())
    inside = (log_p > lp[:, None]).sum(-1) < top_k
    found = {
        "bits_per_byte": -lp.sum() / (math.log(2) * n_bytes),
        "nats_per_token": -lp.mean(),
        "nats": -lp.sum(),
        "n_tokens": torch.tensor(len(lp)),
        "loss_q10": torch.quantile(-lp, 0.1),
        "loss_q50": torch.quantile(-lp, 0.5),
        "loss_q90": torch.quantile(-lp, 0.9),
        "min_k": lp.sort().values[:n].mean(),
        "min_k_plus_plus": z.sort().values[:n].mean(),
        "zlib_ratio": lp.mean() / len(zlib.compress(text.encode())),
        "lowercase_ratio": low_p.gather(1, low_targets[:, None]).mean() / lp.mean(),
        "token_entropy": -mu.mean(),
        "el2n": (p - torch.nn.functional.one_hot(targets, p.shape[1])).norm(dim=-1).mean(),
        "top_k_rank_loss": torch.tensor(np.median(-lp[inside].numpy())),
    }
    return {name: value.item() for name, value in found.items()}


def test_every_measure_is_its_definition(model_dir: str) -> None:
    texts = [SENTENCE, SENTENCE[5:60], "to be or not to be", "MÜHLE Ελληνικά", SENTENCE.lower()]
    scores = score(LanguageModel(model=model_dir, measures=EVERY, top_k=100), texts)
    for number, text in enumerate(texts):
        for name, value in plainly(model_dir, text).items():
            assert scores[name][number] == pytest.approx(value, rel=1e-4), (text, name)
    assert scores["lowercase_ratio"][-1] == 1
    assert scores["lowercase_ratio"][0] != 1


def test_one_pass_gives_what_single_passes_give(llama_dir: str) -> None:
    together = score(LanguageModel(model=llama_dir, measures=EVERY), TEXTS)
    for measure in ("nats_per_token", "min_k_plus_plus", "lowercase_ratio", "token_entropy", "top_k_rank_loss"):
        [(name, values)] = score(LanguageModel(model=llama_dir, measures=(measure,)), TEXTS).items()
        assert together[name] == [v if v is None else pytest.approx(v, rel=1e-4) for v in values]


def test_a_grid_gives_a_column_for_each(llama_dir: str) -> None:
    grid = {"k": (0.1, 0.125, 1.0), "measures": ("min_k", "min_k_plus_plus")}
    scores = score(LanguageModel(model=llama_dir, **grid), [SENTENCE])
    names = [f"{name}_{k}" for name in grid["measures"] for k in ("10", "12_5", "100")]
    assert list(scores) == names
    for k, percent in ((0.1, "10"), (0.125, "12_5"), (1.0, "100")):
        for name, value in score(LanguageModel(model=llama_dir, **(grid | {"k": k})), [SENTENCE]).items():
            assert scores[f"{name}_{percent}"] == value
    quantiles = LanguageModel(model=llama_dir, measures=("loss_quantiles",), quantiles=(0.0, 0.25, 0.999))
    assert [c.name for c in quantiles.columns] == ["loss_q0", "loss_q25", "loss_q99_9"]


def gemma(rust: Tokenizer, folder: Path, **more: Any) -> str:
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=rust.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        **more,
    )
    return save(folder, Gemma2ForCausalLM(config), rust, bos=False)


STATISTICS: tuple[Statistic, ...] = ("entropy", "z_score", "el2n", "rank")


def test_logits_that_are_more_than_the_output_embedding(rust: Tokenizer, tmp_path: Path) -> None:
    """Gemma 2 caps its logits; the shortcut past the model's own head must notice."""
    path = gemma(rust, tmp_path / "gemma", final_logit_softcapping=2.0)
    [found] = CausalLM(path)([SENTENCE], STATISTICS)
    np.testing.assert_allclose(found.log_probs, reference(path, rust.encode(SENTENCE).ids), rtol=1e-4)
    assert found.statistics["entropy"].min() > math.log(rust.get_vocab_size()) - 4  # logits within 2 of each other


def test_both_ways_to_the_logits_give_the_same(rust: Tokenizer, tmp_path: Path) -> None:
    """A cap so high that it changes no more than the last bits sends the same model through its own head."""
    for tied in (True, False):
        direct = gemma(rust, tmp_path / f"direct{tied}", final_logit_softcapping=None, tie_word_embeddings=tied)
        capped = gemma(rust, tmp_path / f"capped{tied}", final_logit_softcapping=1e4, tie_word_embeddings=tied)
        [one], [other] = (CausalLM(path)([SENTENCE], STATISTICS) for path in (direct, capped))
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4)
        for name in STATISTICS:
            np.testing.assert_allclose(one.statistics[name], other.statistics[name], rtol=1e-3, atol=1e-4)


def test_block_size_does_not_matter(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(model_dir, bos=None)
    whole = model([SENTENCE])[0].log_probs
    monkeypatch.setitem(forward.BLOCK, "cpu", 1000)
    np.testing.assert_allclose(model([SENTENCE])[0].log_probs, whole, rtol=1e-5)


def test_out_of_memory_halves_the_batch(gpt2_dir: str) -> None:
    model = CausalLM(gpt2_dir, bos=None)
    expected = model(TEXTS)

    def small_device(rows: int) -> Callable[..., None]:
        def refuse(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[0] > rows:
                raise torch.OutOfMemoryError("out of memory")

        return refuse

    hook = model.model.base_model.register_forward_pre_hook(small_device(1), with_kwargs=True)
    for found, wanted in zip(model(TEXTS), expected, strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, rtol=1e-4, atol=1e-6)
    hook.remove()
    model.model.base_model.register_forward_pre_hook(small_device(0), with_kwargs=True)
    with pytest.raises(ShardError, match="lower `context`"):
        model([SENTENCE])


def test_what_no_model_can_read_is_null(llama_dir: str) -> None:
    model = CausalLM(llama_dir)
    alone, between = model(["fine"]), model(["a\ud800", "fine", ""])
    assert between[0] is None
    assert between[1].log_probs == pytest.approx(alone[0].log_probs)
    assert between[2].log_probs.size == 0
    assert model.predict([]) == model([]) == []


def test_a_model_that_predicts_nothing_finite_is_null_everywhere(rust: Tokenizer, tmp_path: Path) -> None:
    broken = llama(rust)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    found = score(LanguageModel(model=save(tmp_path, broken, rust, bos=True), measures=EVERY), [SENTENCE])
    assert {name for name, [value] in found.items() if value is not None} == {"n_tokens"}


def test_padding_is_counted(llama_dir: str) -> None:
    model = CausalLM(llama_dir)
    assert model.padding == 0
    model([SENTENCE] * 3)
    assert (model.padding, model.places) == (0, model.fed)
    n = model.places // 3
    model([SENTENCE, SENTENCE[:-1]])
    assert model.fed == 4 * n + len(model.tokenize([SENTENCE[:-1]])[0].ids) < model.places == 5 * n
    assert model.padding == 1 - model.fed / model.places


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MillConfig(LlamaConfig):
    model_type = "mill"

class MillForCausalLM(LlamaForCausalLM):
    config_class = MillConfig
"""


def test_code_of_the_models_owner_runs_only_where_the_recipe_says_so(
    rust: Tokenizer, llama_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = save(tmp_path / "mill", llama(rust), rust, bos=True)
    config = json.loads(Path(path, "config.json").read_text())
    names = {"AutoConfig": "mill.MillConfig", "AutoModelForCausalLM": "mill.MillForCausalLM"}
    Path(path, "config.json").write_text(json.dumps(config | {"model_type": "mill", "auto_map": names}))
    Path(path, "mill.py").write_text(OWN_CODE)
    with pytest.raises(RecipeError, match="remote_code = true"):
        LanguageModel(model=path).build()
    trusted = LanguageModel(model=path, measures=ALL, remote_code=True)
    assert score(trusted, [SENTENCE]) == score(LanguageModel(model=llama_dir, measures=ALL), [SENTENCE])
    assert trusted.fingerprint() != LanguageModel(model=path, measures=ALL).fingerprint()


def test_bfloat16_is_near_float32(llama_dir: str) -> None:
    exact, rough = (
        score(LanguageModel(model=llama_dir, dtype=d, measures=EVERY, top_k=100), [SENTENCE])
        for d in ("float32", "bfloat16")
    )
    assert rough != exact
    for name in exact:
        assert rough[name][0] == pytest.approx(exact[name][0], rel=0.05), name


def write_gguf(path: Path, model: LlamaForCausalLM, rust: Tokenizer) -> str:
    """The tiny Llama as llama.cpp's converter would write it: its names, its order of rotary dimensions."""
    config, weights = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([rust.id_to_token(i) for i in range(config.vocab_size)])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(rust.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_gguf_equals_safetensors(rust: Tokenizer, llama_dir: str, tmp_path: Path, capfd: Any) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama(rust), rust)
    capfd.readouterr()
    spec = LanguageModel(model=path, measures=ALL, bos=True)
    assert spec.problems() == []
    from_gguf = score(spec, TEXTS)
    assert capfd.readouterr() == ("", "")  # loading is quiet
    from_folder = score(LanguageModel(model=str(tmp_path), measures=ALL, bos=True), TEXTS)
    assert from_gguf == from_folder
    safetensors = score(LanguageModel(model=llama_dir, measures=ALL), TEXTS)
    for name in ALL:
        assert from_gguf[name] == [v if v is None else pytest.approx(v, rel=1e-5) for v in safetensors[name]]
    assert load_tokenizer(path).encode(SENTENCE).ids == rust.encode(SENTENCE).ids
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    assert "name one of second.gguf, tiny.gguf" in LanguageModel(model=str(tmp_path)).problems()[0]


def test_a_model_that_does_not_load_says_why(rust: Tokenizer, llama_dir: str, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(llama_dir).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    bare = copy("bare")
    weights = load_file(bare / "model.safetensors")
    (bare / "model.safetensors").unlink()
    torch.save(weights, bare / "pytorch_model.bin")  # a pickle: never read
    assert "has no *.safetensors" in LanguageModel(model=str(bare)).problems()[0]
    with pytest.raises(RecipeError, match="no causal language model"):
        LanguageModel(model=str(bare)).build()

    partial = copy("partial")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        LanguageModel(model=str(partial)).build()

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(RecipeError, match="no causal language model"):
        LanguageModel(model=str(cut)).build()

    mute = copy("mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RecipeError, match="no tokenizer"):
        LanguageModel(model=str(mute)).build()

    misfit = copy("misfit")
    larger = Tokenizer.from_str(rust.to_str())
    larger.train_from_iterator(
        [" ".join(f"word{i}" for i in range(900))], trainers.BpeTrainer(vocab_size=900, show_progress=False)
    )
    larger.save(str(misfit / "tokenizer.json"))
    with pytest.raises(RecipeError, match="more tokens than the model"):
        LanguageModel(model=str(misfit)).build()

    for context in (0, 1):
        with pytest.raises(RecipeError, match=f"context = {context} leaves no token to predict"):
            CausalLM(llama_dir, context=context)
    with pytest.raises(RecipeError, match=f"more than the model's {POSITIONS} positions"):
        LanguageModel(model=llama_dir, context=POSITIONS + 1).build()
    (tmp_path / "text.gguf").write_text("no model")
    assert "is no GGUF file" in LanguageModel(model=str(tmp_path / "text.gguf")).problems()[0]
    assert "no file or folder" in LanguageModel(model=str(tmp_path / "nowhere")).problems()[0]
    assert "has no config.json" in LanguageModel(model=str(tmp_path / "..")).problems()[0]


def test_a_model_that_sees_what_it_predicts_is_refused(rust: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=rust.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        is_decoder=False,
    )
    path = save(tmp_path / "bert", BertLMHeadModel(config), rust, bos=False)
    with pytest.raises(RecipeError, match="causal"):
        CausalLM(path, bos=None)


def test_the_spec(llama_dir: str, tmp_path: Path) -> None:
    spec = LanguageModel(model=llama_dir, measures=("min_k", "n_tokens"), k=0.1)
    assert [c.name for c in spec.columns] == ["min_k", "n_tokens"]
    assert pickle.loads(pickle.dumps(spec)) == spec == LanguageModel.model_validate_json(spec.model_dump_json())
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    same = spec.fingerprint()
    assert spec.model_copy().fingerprint() == same
    for change in (
        {"k": 0.2},
        {"dtype": "bfloat16"},
        {"context": 16},
        {"stride": 8},
        {"bos": False},
        {"remote_code": True},
    ):
        assert spec.model_copy(update=change).fingerprint() != same
    for field, value in {"k": 0.1, "quantiles": (0.5,), "top_k": 5, "outside_top_k": "zero"}.items():
        with pytest.raises(ValidationError, match=f"{field}: of use to"):
            LanguageModel(model=llama_dir, **{field: value})
    with pytest.raises(ValidationError, match="min_k_10 would be there twice"):
        LanguageModel(model=llama_dir, measures=("min_k",), k=(0.1, 0.1))
    for bad in (
        {"context": 8, "stride": 9},
        {"context": 1},
        {"stride": 0},
        {"measures": ()},
        {"measures": ("min_k", "min_k")},
        {"context": 0},
        {"k": 0.0},
        {"min_k": 1},
    ):
        with pytest.raises(ValidationError):
            LanguageModel(model=llama_dir, **bad)


def test_the_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, scorers.lm.measures, scorers.lm.color_filter; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
