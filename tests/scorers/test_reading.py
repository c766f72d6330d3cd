"""Texts become tokens: in pieces as in one, and None where a string is no text."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scorers.lm import reading
from scorers.lm.reading import read

WORDS = [
    "the",
    "miller",
    "grinds",
    "barley",
    "while",
    "naïve",
    "🎉",
    "stones",
    "turn",
    "slowly",
    "1,234",
    "times,",
    "Ελληνικά",
    "水车慢慢地转动",
    "--",
    "don't",
]


def text(characters: int) -> str:
    rng = random.Random(1)
    words: list[str] = []
    size = 0
    while size < characters:
        words.append(rng.choice(WORDS) + rng.choice([" ", " ", " ", "  ", "\n", "\n\n", "\t", ". "]))
        size += len(words[-1])
    return "".join(words)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text(5000)], trainer)
    return tokenizer


def without_words() -> Tokenizer:
    """As Llama 2's: spaces become a letter, one is put in front, and nothing splits the text before BPE."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    split = Tokenizer(models.BPE(unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Metaspace()
    split.train_from_iterator([text(5000)], trainer)
    tokenizer.model = split.model
    return tokenizer


def white_space() -> Tokenizer:
    """Drops white space, so that characters of a text belong to no token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        [text(5000)], trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, without_words, white_space])
@pytest.mark.parametrize("length", [0, 1, 2000, 2500, 2999, 3000, 60_000])
def test_pieces_give_the_tokens_of_the_whole(make, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    whole = text(60_000)[:length]
    monkeypatch.setattr(reading, "PIECE", 2000)
    monkeypatch.setattr(reading, "GROUP", 5000)
    texts = ["short one", whole, "", whole[:100]]
    for given, tokens in zip(texts, read(tokenizer, texts, skip_first=False), strict=True):
        assert tokens.ids.tolist() == tokenizer.encode(given, add_special_tokens=False).ids
        assert tokens.n_bytes == len(given.encode())


@pytest.mark.parametrize("character", ["a", " ", "\n", "é"])
def test_one_endless_word(character: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings may never agree; then a seam may lose a token, and no more."""
    tokenizer = byte_level()
    monkeypatch.setattr(reading, "PIECE", 2001)
    whole = character * 20_000
    [tokens] = read(tokenizer, [whole], skip_first=False)
    n = len(tokenizer.encode(whole).ids)
    assert n - 20 <= tokens.ids.size <= n + 20
    assert tokens.n_bytes == len(whole.encode())


def test_a_string_that_is_no_text() -> None:
    tokenizer = byte_level()
    found = read(tokenizer, ["a\ud800b", "fine", "\udfff"], skip_first=True)
    assert [tokens is None for tokens in found] == [True, False, True]
    assert read(tokenizer, [], skip_first=True) == []


MEMORY = """
import resource, sys
from tokenizers import Tokenizer
from scorers.lm import reading
reading.GROUP = reading.PIECE
tokenizer = Tokenizer.from_file(sys.argv[1])
text = "the miller grinds barley while the stones turn slowly " * 50_000
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
[tokens] = reading.read(tokenizer, [text], skip_first=True)
print(len(text) / 1e6, tokens.ids.size, peak() - before)
"""


def test_memory_does_not_grow_with_the_longest_text(tmp_path: Path) -> None:
    """2.7 MB in one text: encoded at once its 450,000 tokens take 290 MB."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "tokenizer.json")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    characters, tokens, megabytes = map(float, done.stdout.split())
    print(f"{characters:.0f} MB, {tokens:,.0f} tokens: {megabytes:,.0f} MB")
    assert megabytes < 120
