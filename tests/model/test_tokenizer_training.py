"""The choice of a front end, and the training of a tokenizer that can encode each text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from evalmode.bundle.frontend import BpeFrontEnd, BpeSpec, NgramSpec
from evalmode.model.config import TrainConfig
from evalmode.model.data_set import DataSet, Texts
from evalmode.model.tokenizer_training import (
    LEARNED_POINTS,
    LONGEST_TOKEN,
    choose_frontend,
    train_bpe,
)

TEXTS = (
    "a small text",
    "another small text",
    "a text that is not so small",
    "smaller and smaller",
) * 5


def data_set() -> DataSet:
    part = Texts(TEXTS, ("x", "y") * 10)
    return DataSet(name="made up", labels=("x", "y"), train=part, validation=part, test=part)


@pytest.mark.parametrize(
    ("data", "frontend", "expected"),
    [
        ("languages", "auto", NgramSpec),
        ("languages", "bpe", BpeSpec),
        ("rows.csv", "auto", BpeSpec),
        ("rows.csv", "ngrams", NgramSpec),
    ],
)
def test_n_grams_are_the_default_for_languages_and_bpe_for_files(data, frontend, expected):
    spec, tokenizer = choose_frontend(
        TrainConfig(data=data, frontend=frontend, vocabulary=300), data_set()
    )
    assert isinstance(spec, expected)
    assert spec.vocabulary <= 300
    assert (tokenizer is None) == (expected is NgramSpec)


def test_each_text_can_be_encoded_and_its_unicode_form_does_not_matter():
    spec, tokenizer = train_bpe(TEXTS, vocabulary=300)
    frontend = BpeFrontEnd(spec, tokenizer)
    for text in ("", "a small text", "日本語 👩‍👩‍👧 \x00", "\ud800"):
        ids = frontend.encode(text).ids
        assert ids[0] == spec.start
        assert ids.max() < spec.vocabulary
        assert (ids != 0).all()
    assert frontend.encode("e\u0301").ids.tolist() == frontend.encode("\u00e9").ids.tolist()


def test_the_name_of_a_special_token_in_a_text_is_plain_text():
    spec, tokenizer = train_bpe(TEXTS, vocabulary=300)
    ids = BpeFrontEnd(spec, tokenizer).encode("[PAD][START]").ids
    assert (ids != 0).all()
    assert (ids[1:] != spec.start).all()


def test_the_same_texts_give_the_same_tokenizer_in_another_process_too():
    program = (
        "import sys; from evalmode.model.tokenizer_training import train_bpe; "
        "sys.stdout.write(train_bpe({}, vocabulary=290)[1])"
    )
    process = subprocess.run(
        [sys.executable, "-c", program.format(TEXTS)], capture_output=True, text=True, check=True
    )
    assert process.stdout == train_bpe(TEXTS, vocabulary=290)[1]


LONG = {
    "words": "some words and more " * 50_000,
    "one word": "x" * 1_000_000,
    "combining marks": "a" + "\u0301\u0316" * 200_000,
    "other letters": "".join(map(chr, random.Random(0).choices(range(0x100, 0x3000), k=100_000))),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_a_long_text_costs_no_more_than_its_first_points(text):
    started = time.process_time()
    tokenizers = [
        train_bpe((*TEXTS, long), vocabulary=8_192) for long in (text, text[:LEARNED_POINTS])
    ]
    assert time.process_time() - started < 8  # without the limit: 144 s for 20 MB of words
    assert tokenizers[0] == tokenizers[1]


def test_a_text_within_the_limit_is_learned_to_its_last_character():
    words = " ".join(f"word{number}" for number in range(900))
    assert len(words) < LEARNED_POINTS
    complete, shortened = (train_bpe((text,) * 3, vocabulary=2_000) for text in (words, words[:-1]))
    assert complete != shortened


def test_a_word_is_one_token_up_to_a_limit_and_a_text_of_a_megabyte_is_truncated():
    word = "".join(random.Random(0).choices("abcdefghij", k=600))
    tokens = json.loads(train_bpe((*TEXTS, word, word), vocabulary=8_192)[1])["model"]["vocab"]
    assert word in tokens
    spec, tokenizer = train_bpe((*TEXTS, "x" * 120_000), vocabulary=8_192)
    assert max(map(len, json.loads(tokenizer)["model"]["vocab"])) <= LONGEST_TOKEN
    assert BpeFrontEnd(spec, tokenizer).encode("x" * 1_000_000).truncated
