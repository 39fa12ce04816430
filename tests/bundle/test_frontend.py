from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from evalmode.bundle.errors import BundleCorrupt
from evalmode.bundle.frontend import (
    BpeFrontEnd,
    BpeSpec,
    FrontEndSpec,
    NgramFrontEnd,
    NgramSpec,
    collate,
    open_frontend,
)

SMALL = NgramSpec(lengths=(2, 4), orders=3, characters=2, vocabulary=1000)
TEXTS = st.text(st.characters(exclude_categories=()))  # lone surrogates too
DEFAULT = NgramFrontEnd(NgramSpec())
WRAP = 2**64


def by_hand(symbols: str, spec: NgramSpec) -> list[list[int]]:
    """The ids of folded symbols, one character and one n-gram after the other, as the docstrings
    say it.
    """
    points = [0] * spec.orders + [ord(symbol) for symbol in symbols]
    per_character = []
    for end in range(spec.orders - 1, len(points)):
        grams = []
        for order in range(1, spec.orders + 1):
            mixed = 1
            for back in range(order):
                mixed = (mixed * 0x9E3779B97F4A7C15 + points[end - back]) % WRAP
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % WRAP
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % WRAP
            grams.append((mixed ^ mixed >> 31) % (spec.vocabulary - 1) + 1)
        per_character.append(grams)
    while len(per_character) % spec.characters:
        per_character.append([0] * spec.orders)
    joined = zip(
        *(per_character[first :: spec.characters] for first in range(spec.characters)), strict=True
    )
    return [[gram for grams in group for gram in grams] for group in joined]


@given(st.text("abcdefgő中é👍", max_size=7))
def test_the_ids_are_the_hashes_that_the_docstring_describes(symbols):
    assert NgramFrontEnd(SMALL).encode(symbols).ids.tolist() == by_hand(symbols, SMALL)


PINNED = [
    [737, 67, 888, 595, 320, 919],
    [399, 129, 125, 857, 497, 827],
    [453, 415, 536, 172, 440, 306],
]


def test_the_ids_are_those_that_every_trained_model_was_trained_on():
    # Written down once: whoever changes these numbers makes every bundle that exists unusable.
    assert NgramFrontEnd(SMALL).encode("Ez 7!").ids.tolist() == PINNED
    assert NgramFrontEnd(SMALL).encode("Ez 7!").ids.tolist() == by_hand("ez 0!", SMALL)


@given(TEXTS)
def test_whatever_the_text_it_has_a_row_that_fits_the_ladder_and_the_table(text):
    row = DEFAULT.encode(text)
    spec = DEFAULT.spec
    assert row.ids.dtype == np.int64
    assert row.ids.shape[1] == DEFAULT.spec.ids_per_position == 16
    assert 1 <= len(row.ids) <= spec.lengths[-1]
    assert spec.padded_length(len(row.ids)) in spec.lengths
    assert row.ids.min() >= 0
    assert row.ids.max() < spec.vocabulary
    assert (row.ids[:, : spec.orders] > 0).all(), (
        "a real position holds an id above 0, which is what masks by"
    )


@given(TEXTS)
def test_the_same_text_has_the_same_ids_in_every_front_end_of_one_spec(text):
    again = open_frontend(NgramSpec.model_validate_json(DEFAULT.spec.model_dump_json()), None)
    assert np.array_equal(again.encode(text).ids, DEFAULT.encode(text).ids)


@given(TEXTS, TEXTS)
def test_what_was_encoded_before_changes_nothing(before, text):
    expected = NgramFrontEnd(SMALL).encode(text)
    frontend = NgramFrontEnd(SMALL)
    frontend.encode(before)
    assert np.array_equal(frontend.encode(text).ids, expected.ids)


def test_an_empty_text_has_one_position():
    row = DEFAULT.encode("")
    assert len(row.ids) == 1
    assert not row.truncated
    assert np.array_equal(DEFAULT.encode(" \n\t ").ids, row.ids)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ez EGY Mondat", "ez egy mondat"),
        ("call 0123", "call 9876"),
        ("٣ and ३", "3 and 7"),
        ("  two\n\twords ", "two words"),
        ("two\u00a0words", "two words"),
        ("e\u0301te\u0301", "été"),
        ("cut \ud83d", "cut \ufffd"),
        ("\ud83d\udc4d", "👍"),
    ],
    ids=[
        "case",
        "digits",
        "digits of other scripts",
        "blanks",
        "no-break space",
        "composition",
        "half",
        "both halves",
    ],
)
def test_what_means_the_same_has_the_same_ids(one, other):
    assert np.array_equal(DEFAULT.encode(one).ids, DEFAULT.encode(other).ids)


@pytest.mark.parametrize(
    ("one", "other"), [("ab", "ba"), ("a", "aa"), ("was", "wäs"), ("a b", "ab"), ("a1", "a")]
)
def test_what_reads_otherwise_has_other_ids(one, other):
    assert not np.array_equal(DEFAULT.encode(one).ids, DEFAULT.encode(other).ids)


@pytest.mark.parametrize(
    ("characters", "truncated"), [(126, False), (127, False), (128, True), (5_000, True)]
)
def test_a_text_is_cut_at_what_the_model_reads_and_says_so(characters, truncated):
    row = DEFAULT.encode("x" * characters)
    assert row.truncated is truncated
    assert len(row.ids) == 32
    if truncated:
        assert np.array_equal(row.ids, DEFAULT.encode("x" * 127).ids)


@given(st.text("ab é1\n", max_size=300))
def test_a_text_that_is_not_cut_is_read_to_its_end(text):
    row, longer = DEFAULT.encode(text), DEFAULT.encode(text + "z")
    assert row.truncated or longer.truncated or not np.array_equal(row.ids, longer.ids)


def test_the_blanks_around_and_between_words_do_not_count_as_length():
    spread = " " * 100_000 + "two" + "\n" * 100_000 + "words"
    assert np.array_equal(DEFAULT.encode(spread).ids, DEFAULT.encode("two words").ids)
    assert not DEFAULT.encode(spread).truncated


def test_a_heap_of_combining_marks_takes_no_longer_than_its_length():
    began = time.process_time()
    # composed as a whole it would take a minute
    row = DEFAULT.encode("a" + "\u0301\u0316" * 250_000)
    assert row.truncated
    assert time.process_time() - began < 2


def test_marks_that_can_be_read_are_composed():
    accents = "\u0065\u0323\u0302 " * 30  # ệ in three code points
    assert np.array_equal(DEFAULT.encode(accents).ids, DEFAULT.encode("ệ " * 30).ids)


@pytest.mark.parametrize(("length", "padded"), [(1, 4), (4, 4), (5, 8), (9, 16), (32, 32)])
def test_a_row_is_padded_to_the_first_rung_that_holds_it(length, padded):
    assert NgramSpec().padded_length(length) == padded


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": ()},
        {"lengths": (0, 4)},
        {"lengths": (8, 4)},
        {"lengths": (4, 4)},
        {"orders": 0},
        {"characters": 0},
        {"vocabulary": 1},
        {"order": 3},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_naming_the_field(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        NgramSpec(**wrong)


def test_a_spec_is_known_by_its_kind():
    adapter = TypeAdapter(FrontEndSpec)
    for spec in (NgramSpec(), BpeSpec(vocabulary=7)):
        assert adapter.validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"kind": "words"})


def test_rows_with_several_ids_a_position_are_padded_with_0_and_need_no_mask():
    rows = [DEFAULT.encode(text).ids for text in ("", "some words")]
    inputs = collate(rows, length=4)
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == (2, 4, 16)
    for row, padded in zip(rows, inputs["input_ids"], strict=True):
        assert np.array_equal(padded[: len(row)], row)
        assert not padded[len(row) :].any()


def test_rows_with_one_id_a_position_come_with_a_mask():
    inputs = collate([np.array([1, 5]), np.array([1, 0, 7])], length=4)
    assert inputs["input_ids"].tolist() == [[1, 5, 0, 0], [1, 0, 7, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert inputs["attention_mask"].dtype == np.int64


@pytest.fixture(scope="module")
def tokenizer() -> str:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["Ez egy rövid mondat.", "Dit is een zin."] * 4, trainer)
    return trained.to_str()


BPE = BpeSpec(vocabulary=300, lengths=(4, 16))


@settings(max_examples=50)
@given(text=TEXTS)
def test_a_tokenizer_gives_any_text_a_row_that_starts_with_its_start(tokenizer, text):
    frontend = open_frontend(BPE, tokenizer)
    row = frontend.encode(text)
    assert frontend.spec.ids_per_position == 1
    assert row.ids.dtype == np.int64
    assert row.ids[0] == BPE.start
    assert 1 <= len(row.ids) <= 16
    assert row.ids.max() < BPE.vocabulary
    assert (row.ids > 0).all()
    assert np.array_equal(open_frontend(BPE, tokenizer).encode(text).ids, row.ids)


def test_a_tokenizer_cuts_at_what_the_model_reads_and_says_so(tokenizer):
    frontend = BpeFrontEnd(BPE, tokenizer)
    assert frontend.encode("").ids.tolist() == [1]
    known = frontend.encode("q" * 15)
    assert (len(known.ids), known.truncated) == (16, False)
    cut = frontend.encode("q" * 16)
    assert (len(cut.ids), cut.truncated) == (16, True)


@pytest.mark.parametrize("broken", ["", "{}", json.dumps({"model": {"type": "none"}})])
def test_a_file_that_is_no_tokenizer_is_refused_with_its_name(broken):
    with pytest.raises(BundleCorrupt, match=r"tokenizer\.json"):
        open_frontend(BPE, broken)
