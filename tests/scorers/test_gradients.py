"""Gradients of documents: against autograd one document at a time, and against themselves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from scorers.influence import reducers
from scorers.influence.capture import Batch, Capture
from scorers.influence.gradients import (
    Document,
    GradientModel,
    covariances,
    projected,
    squared_norms,
    summed,
)
from scorers.influence.layers import Layer, canonical, choose
from scorers.influence.projection import Projection, rademacher
from scorers.lm.forward import CausalLM
from scorers.lm.windows import windows
from storage.errors import RecipeError, ShardError

SENTENCE = "The miller's water wheel turns slowly, and the stones grind 1,234 sacks of barley. "
TEXTS = ["", "a", SENTENCE, SENTENCE[:20], SENTENCE * 3, "to be or not to be", SENTENCE[5:60], SENTENCE[:20]]
POSITIONS = 128
KNOWN = [[-1, 1, 1, 1, 1, 1, 1, -1], [1, 1, 1, -1, -1, -1, -1, 1]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(vocabulary: int, **config: Any) -> Any:
    config = {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.3} | config
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **SIZES, **config))


def gpt2(vocabulary: int) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases begin at zero
    return model


def gemma(vocabulary: int, kind: type, config: type, **more: Any) -> Any:
    more |= {"head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "sliding_window": 16}
    return kind(config(vocab_size=vocabulary, initializer_range=0.3, **SIZES, **more))


MODELS: dict[str, tuple[Callable[[int], Any], bool]] = {
    "llama": (llama, True),
    "llama with biases": (lambda v: llama(v, attention_bias=True, mlp_bias=True), True),
    "llama, tied": (lambda v: llama(v, tie_word_embeddings=True, pad_token_id=7), False),
    "gpt2": (gpt2, False),
    "gemma2": (lambda v: gemma(v, Gemma2ForCausalLM, Gemma2Config), True),
    "gemma3": (lambda v: gemma(v, Gemma3ForCausalLM, Gemma3TextConfig, tie_word_embeddings=True), True),
}


def saved(folder: Path, make: Callable[[int], Any], *, bos: bool) -> str:
    """A model with random weights and a tokenizer, with a BOS before a text or without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(1)
    make(tokenizer.get_vocab_size()).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    make, bos = MODELS[request.param]
    return saved(tmp_path_factory.mktemp("model"), make, bos=bos)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("plain"), llama, bos=True)


def by_autograd(path: str, gradients: GradientModel, document: Document) -> dict[str, torch.Tensor]:
    """Each layer's gradient [outputs, inputs] of a document's summed loss, window by window, by the weights' .grad."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prefix, first = list(gradients.lm.prefix), 0 if gradients.lm.prefix else 1
    width, stride = gradients.lm.context - len(prefix), gradients.lm.stride
    for w in windows(0, document.ids.size, width, stride, first):
        ids = torch.tensor([prefix + document.ids[w.start : w.stop].tolist()])
        labels = ids.clone()
        labels[0, : len(prefix) + w.first - w.start] = -100
        if document.targets is not None:
            labels[0, len(prefix) :][~torch.from_numpy(document.targets[w.start : w.stop])] = -100
        logits = model(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
    modules, found = dict(model.named_modules()), {}
    for layer in gradients.layers:
        module = modules[layer.modules[0]]
        weight = module.weight.grad if module.weight.grad is not None else torch.zeros_like(module.weight)
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        bias = [module.bias.grad[:, None]] if layer.bias else []
        found[layer.name] = torch.cat([weight, *bias], dim=1)
    return found


def flat(gradients: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([g.flatten() for g in gradients.values()]).double().numpy()


def test_norms_projections_and_sums_are_those_of_autograd(folder: str) -> None:
    """All layers and embeddings: tied, biased, transposed, scaled, with a pad token; documents of several windows."""
    model = GradientModel(folder, layers=["*"], context=40, stride=30)
    documents = model.documents(TEXTS)
    assert max(map(len, model.windows(documents))) > 2
    explicit = [by_autograd(folder, model, d) if d.ids.size > 1 else None for d in documents]
    wanted = [float(flat(g) @ flat(g)) if g else 0 for g in explicit]
    found = squared_norms(model, documents)
    np.testing.assert_allclose(found[2:], wanted[2:], rtol=1e-5)
    assert found[0] == 0
    every = model.projection(7, seed=3)
    rows = projected(model, documents, every)
    for row, gradient in zip(rows, explicit, strict=True):
        if gradient:
            alone = every.of(gradient).numpy()
            np.testing.assert_allclose(row, alone, atol=1e-5 * np.abs(alone).max())
    both = summed(model, documents[2:4])
    for name, gradient in both.items():
        alone = (explicit[2][name] + explicit[3][name]).numpy()
        np.testing.assert_allclose(gradient.numpy(), alone, atol=1e-5 * np.abs(alone).max())


def test_only_the_answers_targets_count(folder: str) -> None:
    model = GradientModel(folder, layers=["*"], context=40)
    [document] = model.documents([SENTENCE * 2])
    assert document is not None
    targets = np.arange(document.ids.size) % 7 == 3
    targets[:40] = False  # the first window has none, and is not read
    answers = Document(document.ids, targets)
    assert model.n_predicted(answers) == targets.sum()
    gradient = flat(by_autograd(folder, model, answers))
    assert squared_norms(model, [answers])[0] == pytest.approx(gradient @ gradient, rel=1e-5)


def test_a_gradient_does_not_depend_on_its_batch(folder: str) -> None:
    """Neither on what shares the batch, nor on the order, the padding, or how many batches there are."""
    model = GradientModel(folder, layers=["*"])
    documents = model.documents(TEXTS)
    projection = model.projection(5)
    norms, rows = squared_norms(model, documents), projected(model, documents, projection)
    np.testing.assert_allclose(squared_norms(model, documents[::-1])[::-1], norms, rtol=1e-5)
    for some in (slice(0, 4), slice(4, None)):  # two shards
        np.testing.assert_allclose(squared_norms(model, documents[some]), norms[some], rtol=1e-5)
        errors = np.abs(projected(model, documents[some], projection) - rows[some]).max(axis=1)
        assert (errors <= 1e-5 * np.abs(rows[some]).max(axis=1)).all()


def test_two_routes_one_norm() -> None:
    """The worked example: gradient 55.25, with its bias 73.5; the tokens' own squared norms would sum to 50.25."""
    left = torch.tensor([[[1.0, 0, 2], [-1, 1, 0], [0.5, 2, 1]]])
    right = torch.tensor([[[1.0, 2], [3, -1], [0, 1]]])
    assert reducers._ghost(left, right, False).item() == pytest.approx(55.25)
    assert reducers._ghost(left, right, True).item() == pytest.approx(73.5)
    assert reducers._embedding(torch.tensor([[5, 7, 5]]), left).item() == pytest.approx(17.25)
    for room in (1, 4, 6, 100):  # by columns, by rows, whole
        with patch.dict(reducers.MATERIALISED, cpu=room):
            many = reducers._materialised(left.repeat(3, 1, 1), right.repeat(3, 1, 1))
            np.testing.assert_allclose(many, [55.25] * 3)
    signs = Projection([Layer("a", 3, 2, False, ("a",), False)], 2)
    signs.left["a"] = torch.tensor([[1.0, -1, 1], [1, 1, -1]])
    signs.right["a"], signs.scale["a"] = torch.tensor([[1.0, 1], [1, -1]]), 0.5
    np.testing.assert_allclose(signs.of({"a": left[0].T @ right[0]}), [2.25, -5.25, -0.75, -0.25])


@pytest.mark.parametrize("route", ["ghost", "materialised"])
def test_either_route_alone_gives_the_norms(folder: str, route: str) -> None:
    model = GradientModel(folder, layers=["*"])
    documents = model.documents(TEXTS)
    norms = squared_norms(model, documents)

    def ghost(left: torch.Tensor, right: torch.Tensor, bias: bool) -> torch.Tensor:
        return reducers_ghost(left, right, bias)

    def materialised(left: torch.Tensor, right: torch.Tensor, bias: bool = False) -> torch.Tensor:
        found = reducers_materialised(left, right)
        return found + left.sum(1).square().sum(1) if bias else found

    reducers_ghost, reducers_materialised = reducers._ghost, reducers._materialised
    if route == "ghost":  # the bias is the caller's on the other route
        replaced = patch.object(reducers, "_materialised", lambda left, right: ghost(left, right, False))
    else:
        replaced = patch.object(reducers, "_ghost", materialised)
    with replaced:
        np.testing.assert_allclose(squared_norms(model, documents), norms, rtol=1e-5)


def test_inner_products_are_unbiased(plain: str) -> None:
    """Over seeds, for both ways to combine: the mean of the projected inner products is the exact one."""
    model = GradientModel(plain)
    documents = model.documents([SENTENCE, SENTENCE[10:70]])
    one, two = (flat(summed(model, [d])) for d in documents)
    for combine in ("concatenate", "sum"):
        found = []
        for seed in range(40):
            rows = projected(model, documents, model.projection(6, seed=seed, combine=combine)).astype(float)
            found.append([rows[0] @ rows[1], rows[0] @ rows[0]])
        error = np.std(found, axis=0) / 40**0.5
        assert (np.abs(np.mean(found, axis=0) - [one @ two, one @ one]) < 4 * error).all()
    assert model.projection(6).dimensions == 14 * 36
    assert model.projection(6, combine="sum").dimensions == 36
    whole = projected(model, documents, model.projection(10_000)).astype(float)  # no side is that long: exact
    np.testing.assert_allclose(whole @ whole.T, [[one @ one, one @ two], [one @ two, two @ two]], rtol=1e-5)


def test_signs_hang_on_seed_and_name_alone() -> None:
    """Known values, so that no library's version and no machine may change them."""
    assert rademacher(0, "model.layers.0.mlp", "left", 2, 8).tolist() == KNOWN
    other = [rademacher(0, "model.layers.0.mlp", "right", 2, 8), rademacher(1, "model.layers.0.mlp", "left", 2, 8)]
    assert all(matrix.tolist() != KNOWN for matrix in other)
    many = rademacher(5, "x", "left", 300, 301).astype(float)
    assert np.abs(many @ many.T / 301 - np.eye(300)).max() < 0.35


def test_wrappers_do_not_change_the_projection(plain: str) -> None:
    """torch.compile and DDP put their own names before a module's; a module of another name is another layer."""
    model = GradientModel(plain, layers=["model.layers.*"])
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module._orig_mod = model.lm.model
    wrapped.get_output_embeddings = model.lm.model.get_output_embeddings
    layers = choose(wrapped, ["model.layers.*"], "refuse")
    assert [layer.name for layer in layers] == [layer.name for layer in model.layers]
    assert Projection(layers, 4).layout == Projection(model.layers, 4).layout
    renamed = [replace(layer, name=layer.name.replace("self_attn", "attention")) for layer in model.layers]
    assert Projection(renamed, 4).layout != Projection(model.layers, 4).layout
    assert Projection(model.layers, 4, seed=1).layout != Projection(model.layers, 4).layout
    assert canonical("module._orig_mod.model.layers.0") == "model.layers.0"


def test_a_transform_sees_whole_gradients(plain: str) -> None:
    model = GradientModel(plain, context=40)
    documents = [*model.documents(TEXTS[1:5]), None]
    projection = model.projection(5)
    same = projected(model, documents, projection, lambda _, gradient: gradient)
    np.testing.assert_allclose(same, projected(model, documents, projection), atol=1e-5 * np.abs(same).max())
    squared = projected(model, documents, projection, lambda _, gradient: gradient.square())
    explicit = {name: g.square() for name, g in by_autograd(plain, model, documents[3]).items()}
    np.testing.assert_allclose(squared[3], projection.of(explicit), rtol=1e-3, atol=1e-5 * np.abs(squared[3]).max())
    assert not squared[4].any()


def test_covariances_count_tokens_not_padding(folder: str) -> None:
    model = GradientModel(folder)
    documents = model.documents(TEXTS)
    together = covariances(model, documents)
    alone = [covariances(model, [document]) for document in documents]
    for layer in model.layers:
        inputs, outputs, tokens = together[layer.name]
        assert inputs.shape == (layer.inputs, layer.inputs)
        assert outputs.shape == (layer.outputs, layer.outputs)
        assert tokens == sum(len(model.lm.prefix) + d.ids.size - 1 for d in documents if model.n_predicted(d))
        for side, whole in (("inputs", inputs), ("outputs", outputs)):
            parts = sum(getattr(each[layer.name], side) for each in alone)
            np.testing.assert_allclose(whole, parts, atol=1e-5 * whole.abs().max().item())
        if layer.bias:
            assert inputs[-1, -1] == tokens
    with pytest.raises(RecipeError, match="leave embeddings out"):
        covariances(GradientModel(folder, layers=["*"]), documents)


def test_sampled_targets_hang_on_the_seed(plain: str) -> None:
    model = GradientModel(plain, layers=["*down_proj"])
    documents = model.documents([SENTENCE] * 3)
    name = model.layers[0].name
    once, again, other, own = (covariances(model, documents, sample=seed)[name] for seed in (1, 1, 2, None))
    assert torch.equal(once.outputs, again.outputs)
    assert not torch.equal(once.outputs, other.outputs)
    assert not torch.equal(once.outputs, own.outputs)
    assert torch.equal(once.inputs, other.inputs)


def test_targets_are_sampled_as_the_model_predicts() -> None:
    """Evenly spaced uniforms draw each token as often as its probability says, to within one."""
    n = 1000
    logits = torch.tensor([0.3, -2.0, 1.5, -30.0, 0.0]).expand(n, -1)
    uniforms = ((torch.arange(n) + 0.5) / n).double()[None]
    targets = torch.zeros(1, n, dtype=torch.int64)
    targets[0, ::2] = -100
    drawn = Capture._residual(logits, Batch(np.zeros(1, int), targets, targets, targets >= 0, uniforms), slice(None))
    assert not drawn[::2].any()
    counts = (logits.softmax(-1) - drawn)[1::2].sum(0)
    np.testing.assert_allclose(counts, n / 2 * logits[0].softmax(-1), atol=1)


def test_out_of_memory_halves_the_batch(plain: str) -> None:
    """Also in the middle of a backward pass, when part of the gradients is there."""
    model = GradientModel(plain, context=40)
    documents = model.documents(TEXTS)
    norms, whole = squared_norms(model, documents), summed(model, documents)
    limit = 1

    def refuse(module: Any, gradient: Any) -> None:
        if gradient[0].shape[0] > limit:
            raise torch.OutOfMemoryError("out of memory")

    model.lm.model.model.layers[0].mlp.register_full_backward_pre_hook(refuse)
    np.testing.assert_allclose(squared_norms(model, documents), norms, rtol=1e-5)
    model = GradientModel(plain, context=40)
    model.lm.model.model.layers[0].mlp.register_full_backward_pre_hook(refuse)
    for name, gradient in summed(model, documents).items():
        np.testing.assert_allclose(gradient, whole[name], atol=1e-5 * whole[name].abs().max().item())
    limit = 0
    with pytest.raises(ShardError, match="lower `context`"):
        squared_norms(model, documents)


def test_what_cannot_be_captured_is_named(plain: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'model.h.\*' matches none of"):
        GradientModel(plain, layers=["model.h.*"])
    mixture = MixtralConfig(vocab_size=300, num_local_experts=2, num_key_value_heads=2, **SIZES)
    path = saved(tmp_path, lambda v: MixtralForCausalLM(mixture), bos=True)
    with pytest.raises(RecipeError, match=r"model.layers.0.mlp.experts \(MixtralExperts\).*uncaptured = \"skip\""):
        GradientModel(path)
    model = GradientModel(path, uncaptured="skip")
    assert {layer.name.split(".")[-1] for layer in model.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    [document] = model.documents([SENTENCE])
    gradient = flat(by_autograd(path, model, document))
    assert squared_norms(model, [document])[0] == pytest.approx(gradient @ gradient, rel=1e-5)


def test_layers_that_are_not_applied_once_are_named(plain: str) -> None:
    lm = CausalLM(plain)
    layers = lm.model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(RecipeError, match=r"layers.0.mlp.down_proj \(is applied 2 times in a pass\)"):
        Capture(lm, ["*mlp*"], "refuse")
    layers[1].self_attn.k_proj.weight = layers[0].self_attn.k_proj.weight
    with pytest.raises(RecipeError, match=r"k_proj \(shares its weight with model.layers.1.self_attn.k_proj\)"):
        Capture(lm, ["*k_proj"], "refuse")
    kept = Capture(lm, None, "skip").layers
    assert [layer.name for layer in kept if "mlp" in layer.name or "k_proj" in layer.name] == []


def test_nothing_below_the_lowest_layer_is_passed_back(plain: str) -> None:
    model = GradientModel(plain, layers=["model.layers.1.mlp.*"])
    reached = []
    for number, block in enumerate(model.lm.model.model.layers):
        block.mlp.register_forward_hook(lambda _m, _a, output, n=number: reached.append((n, output.requires_grad)))
    assert squared_norms(model, model.documents([SENTENCE]))[0] > 0
    assert reached == [(0, False), (1, True)]
    assert all(parameter.grad is None for parameter in model.lm.model.parameters())


def test_bfloat16_is_near(folder: str) -> None:
    """Weights and activations are rounded, the sums are not."""
    exact, rounded = (GradientModel(folder, layers=["*"], dtype=dtype) for dtype in ("float32", "bfloat16"))
    documents = exact.documents([SENTENCE, SENTENCE * 3])
    np.testing.assert_allclose(squared_norms(rounded, documents), squared_norms(exact, documents), rtol=0.1)
    one = projected(exact, documents, exact.projection(6))
    two = projected(rounded, documents, rounded.projection(6))
    assert (np.sum(one * two, 1) > 0.98 * np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)).all()
