"""The front end of a run: which one it is, and a tokenizer that every text can be written in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evalmode.bundle.frontend import BpeFrontEnd, BpeSpec, NgramSpec
from evalmode.model.config import TrainConfig
from evalmode.model.data import DataSet
from evalmode.model.texts import Texts
from evalmode.model.tokenizer_training import choose_frontend, train_bpe

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
    ("data", "asked", "expected"),
    [
        ("languages", "auto", NgramSpec),
        ("languages", "bpe", BpeSpec),
        ("rows.csv", "auto", BpeSpec),
        ("rows.csv", "ngrams", NgramSpec),
    ],
)
def test_languages_are_read_by_n_grams_and_files_by_bpe_unless_asked_otherwise(
    data, asked, expected
):
    spec, tokenizer = choose_frontend(
        TrainConfig(data=data, frontend=asked, vocabulary=300), data_set()
    )
    assert isinstance(spec, expected)
    assert spec.vocabulary <= 300
    assert (tokenizer is None) == (expected is NgramSpec)


def test_every_text_can_be_written_and_its_composition_does_not_matter():
    spec, tokenizer = train_bpe(TEXTS, vocabulary=300)
    frontend = BpeFrontEnd(spec, tokenizer)
    for text in ("", "a small text", "日本語 👩‍👩‍👧 \x00", "\ud800"):
        ids = frontend.encode(text).ids
        assert ids[0] == spec.start
        assert ids.max() < spec.vocabulary
        assert (ids != 0).all()
    assert frontend.encode("e\u0301").ids.tolist() == frontend.encode("\u00e9").ids.tolist()


def test_a_text_that_names_a_special_token_is_only_a_text():
    spec, tokenizer = train_bpe(TEXTS, vocabulary=300)
    ids = BpeFrontEnd(spec, tokenizer).encode("[PAD][START]").ids
    assert (ids != 0).all()
    assert (ids[1:] != spec.start).all()


def test_the_same_texts_give_the_same_tokenizer_in_another_process_too():
    program = (
        "import sys; from evalmode.model.tokenizer_training import train_bpe; "
        "sys.stdout.write(train_bpe({}, vocabulary=290)[1])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program.format(TEXTS)], capture_output=True, text=True, check=True
    )
    assert ran.stdout == train_bpe(TEXTS, vocabulary=290)[1]
