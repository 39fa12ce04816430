from __future__ import annotations

import json
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

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
    """The ids of normalised symbols, n-gram by n-gram, as the docstrings describe them."""
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
    # These numbers must never change: every existing bundle would become unusable.
    assert NgramFrontEnd(SMALL).encode("Ez 7!").ids.tolist() == PINNED
    assert NgramFrontEnd(SMALL).encode("Ez 7!").ids.tolist() == by_hand("ez 0!", SMALL)


@given(TEXTS)
def test_any_text_has_a_row_that_fits_the_ladder_and_the_table(text):
    row = DEFAULT.encode(text)
    spec = DEFAULT.spec
    assert row.ids.dtype == np.int64
    assert row.ids.shape[1] == DEFAULT.spec.ids_per_position == 16
    assert 1 <= len(row.ids) <= spec.lengths[-1]
    assert spec.padded_length(len(row.ids)) in spec.lengths
    assert row.ids.min() >= 0
    assert row.ids.max() < spec.vocabulary
    assert (row.ids[:, : spec.orders] > 0).all(), (
        "a real position holds an id above 0, which is what the model masks by"
    )


@given(TEXTS)
def test_the_same_text_has_the_same_ids_in_every_front_end_of_one_spec(text):
    reopened = open_frontend(NgramSpec.model_validate_json(DEFAULT.spec.model_dump_json()), None)
    assert np.array_equal(reopened.encode(text).ids, DEFAULT.encode(text).ids)


@given(TEXTS, TEXTS)
def test_the_ids_of_a_text_do_not_depend_on_earlier_texts(before, text):
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
    ("text", "other_text"),
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
def test_texts_that_differ_in_case_digits_blanks_or_composition_have_the_same_ids(text, other_text):
    assert np.array_equal(DEFAULT.encode(text).ids, DEFAULT.encode(other_text).ids)


@pytest.mark.parametrize(
    ("text", "other_text"), [("ab", "ba"), ("a", "aa"), ("was", "wäs"), ("a b", "ab"), ("a1", "a")]
)
def test_texts_that_differ_in_letters_or_their_order_have_other_ids(text, other_text):
    assert not np.array_equal(DEFAULT.encode(text).ids, DEFAULT.encode(other_text).ids)


@pytest.mark.parametrize(
    ("characters", "truncated"), [(126, False), (127, False), (128, True), (5_000, True)]
)
def test_a_text_longer_than_the_model_reads_is_cut_and_marked_truncated(characters, truncated):
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


def test_half_a_million_combining_marks_are_encoded_in_two_seconds():
    began = time.process_time()
    # Composing all of it would take a minute.
    row = DEFAULT.encode("a" + "\u0301\u0316" * 250_000)
    assert row.truncated
    assert time.process_time() - began < 2


def test_combining_marks_within_the_limit_are_composed():
    accents = "\u0065\u0323\u0302 " * 30  # ệ in three code points
    assert np.array_equal(DEFAULT.encode(accents).ids, DEFAULT.encode("ệ " * 30).ids)


@pytest.mark.parametrize(("length", "padded"), [(1, 4), (4, 4), (5, 8), (9, 16), (32, 32)])
def test_a_row_is_padded_to_the_first_length_that_holds_it(length, padded):
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
def test_an_invalid_spec_is_refused_with_the_name_of_the_field(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        NgramSpec(**wrong)


def test_a_spec_is_parsed_by_its_kind():
    adapter = TypeAdapter(FrontEndSpec)
    for spec in (NgramSpec(), BpeSpec(vocabulary=7)):
        assert adapter.validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"kind": "words"})


def test_rows_with_several_ids_per_position_are_padded_with_0_and_have_no_mask():
    rows = [DEFAULT.encode(text).ids for text in ("", "some words")]
    inputs = collate(rows, length=4)
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == (2, 4, 16)
    for row, padded in zip(rows, inputs["input_ids"], strict=True):
        assert np.array_equal(padded[: len(row)], row)
        assert not padded[len(row) :].any()


def test_rows_with_one_id_per_position_have_an_attention_mask():
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
def test_a_tokenizer_gives_any_text_a_row_that_begins_with_the_start_id(tokenizer, text):
    frontend = open_frontend(BPE, tokenizer)
    row = frontend.encode(text)
    assert frontend.spec.ids_per_position == 1
    assert row.ids.dtype == np.int64
    assert row.ids[0] == BPE.start
    assert 1 <= len(row.ids) <= 16
    assert row.ids.max() < BPE.vocabulary
    assert (row.ids > 0).all()
    assert np.array_equal(open_frontend(BPE, tokenizer).encode(text).ids, row.ids)


def test_a_tokenizer_cuts_a_text_longer_than_the_model_reads_and_marks_it_truncated(tokenizer):
    frontend = BpeFrontEnd(BPE, tokenizer)
    assert frontend.encode("").ids.tolist() == [1]
    longest = frontend.encode("q" * 15)
    assert (len(longest.ids), longest.truncated) == (16, False)
    cut = frontend.encode("q" * 16)
    assert (len(cut.ids), cut.truncated) == (16, True)


@pytest.mark.parametrize("broken", ["", "{}", json.dumps({"model": {"type": "none"}})])
def test_an_unreadable_tokenizer_file_is_refused_with_its_name(broken):
    with pytest.raises(BundleCorrupt, match=r"tokenizer\.json"):
        open_frontend(BPE, broken)


SENTENCES = [
    "Ez egy rövid mondat, meg 12 alma.",
    "Dit is een zin!  With  blanks, \n\nand e\u0323\u0301 marks: 각 👩‍👩‍👧",
    "xxxxxxxxxxxxxxxxxxxxxxxx ------------------------------ https://example.org/a/b?c=d",
]


def described(
    model: models.Model,
    trainer: trainers.Trainer,
    *,
    normalizer: normalizers.Normalizer | None = None,
    splitter: pre_tokenizers.PreTokenizer | None = None,
    added: tuple[AddedToken, ...] = (),
    sentences: list[str] = SENTENCES,
) -> str:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(sentences * 3, trainer)
    tokenizer.add_tokens([*added])
    return tokenizer.to_str()


def byte_pairs(vocabulary: int = 400, **parts: object) -> str:
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[] if parts.get("added") else ["<pad>", "<start>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = json.loads(described(models.BPE(), trainer, **parts))
    if not parts.get("added"):
        tokenizer["added_tokens"] = []
    return json.dumps(tokenizer)


LONG_WORD = "".join(chr(97 + (number * number // 7) % 26) for number in range(3_000))
LOSSLESS = {
    "as trained here": byte_pairs(
        normalizer=normalizers.NFC(), splitter=pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "a word of 3,000 letters is one token": byte_pairs(
        4_000,
        normalizer=normalizers.NFC(),
        splitter=pre_tokenizers.ByteLevel(add_prefix_space=False),
        sentences=[*SENTENCES, LONG_WORD],
    ),
    "the whole text is one word": byte_pairs(
        splitter=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
}
SPECIAL = ["[UNK]", "<pad>", "<start>"]
OTHERS = {
    "runs of blanks are one blank": byte_pairs(
        normalizer=normalizers.Sequence(
            [normalizers.Replace(Regex(" {2,}"), " "), normalizers.NFC()]
        ),
        splitter=pre_tokenizers.ByteLevel(),
    ),
    "tags are removed": byte_pairs(
        normalizer=normalizers.Replace(Regex("<[^>]*>"), ""), splitter=pre_tokenizers.ByteLevel()
    ),
    "quotations are removed": byte_pairs(
        splitter=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex('"[^"]*"'), "removed"), pre_tokenizers.ByteLevel()]
        )
    ),
    "letters lose case, marks and blanks around them": byte_pairs(
        normalizer=normalizers.Sequence(
            [
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Strip(),
            ]
        ),
        splitter=pre_tokenizers.ByteLevel(),
    ),
    "an added token takes the blanks around it": byte_pairs(
        splitter=pre_tokenizers.ByteLevel(add_prefix_space=False),
        added=(AddedToken("<cut>", lstrip=True, rstrip=True),),
    ),
    "WordPiece as in BERT": described(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
        normalizer=normalizers.BertNormalizer(),
        splitter=pre_tokenizers.BertPreTokenizer(),
    ),
    "whole words, blanks removed": described(
        models.WordLevel(unk_token="[UNK]"),
        trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
        splitter=pre_tokenizers.WhitespaceSplit(),
    ),
    "unigrams as in SentencePiece": described(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        splitter=pre_tokenizers.Metaspace(),
    ),
    "no words at all, as in Llama 2": described(
        models.BPE(unk_token="[UNK]", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
}
PIECES = st.sampled_from(
    [
        *("a", "x", "xy", "zin ", "mondat, ", "is", "12", "7 ", "A", "ß", "İ", "-", "!?", "日本"),
        *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", " \n"),
        *(
            "\u0301",
            "\u0323",
            "\u0301\u0323",
            "e\u0301",
            "e\u0323\u0301",
            "\u0958",
            "\u1112\u1161\u11ab",
        ),
        *(
            "👩‍👩‍👧",
            "👍",
            "\ud83d",
            "\ude00",
            "\x00",
            "\ufeff",
            "<b>",
            "<",
            '"',
            "<cut>",
            "'s",
            LONG_WORD,
        ),
    ]
)
LONG_TEXTS = st.lists(
    st.tuples(PIECES, st.integers(1, 3) | st.integers(1, 700) | st.integers(1, 6_000)), max_size=6
).map(lambda parts: "".join(piece * count for piece, count in parts)[:30_000])
SHORT_LADDER = BpeSpec(vocabulary=5_000, lengths=(4, 16))


def uncut(tokenizer: str, text: str) -> list[int]:
    readable = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return Tokenizer.from_str(tokenizer).encode(readable, add_special_tokens=False).ids


@pytest.mark.parametrize("name", [*LOSSLESS, *OTHERS])
@settings(max_examples=60, deadline=None)
@given(text=LONG_TEXTS)
def test_a_text_that_fits_has_all_of_its_ids_and_any_other_is_marked_truncated(name, text):
    tokenizer = (LOSSLESS | OTHERS)[name]
    all_ids = uncut(tokenizer, text)
    row = BpeFrontEnd(SHORT_LADDER, tokenizer).encode(text)
    assert row.truncated == (len(all_ids) > 15)
    if not row.truncated:
        assert row.ids.tolist() == [SHORT_LADDER.start, *all_ids]


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.text(st.characters(exclude_categories=()), min_size=1, max_size=40), min_size=1
    ),
    count=st.integers(1, 200),
)
def test_a_text_of_words_that_does_not_fit_has_the_first_ids_of_the_whole_text(words, count):
    text = " ".join(words * count)
    for tokenizer in LOSSLESS.values():
        all_ids = uncut(tokenizer, text)
        assert BpeFrontEnd(SHORT_LADDER, tokenizer).encode(text).ids.tolist() == [1, *all_ids[:15]]


def test_a_text_can_have_one_and_a_half_code_points_for_each_byte_of_its_composed_form():
    # The bound on the length of a text that fits relies on this.
    ratios = {
        len(unicodedata.normalize("NFD", letter)) / len(letter.encode())
        for letter in map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
        if unicodedata.normalize("NFC", letter) == letter
    }
    assert max(ratios) == 1.5


LONG = {
    "words": "some words and more ",
    "one word": "x",
    "combining marks": "\u0301\u0316",
    "blanks": " ",
    "line ends": "\n",
    "emoji": "👩‍👩‍👧",
    "halves of emoji": "\ud83d",
}


@pytest.mark.parametrize("piece", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("kind", ["ngrams", "bpe"])
def test_ten_million_code_points_are_encoded_in_half_a_second(kind, piece):
    frontend = DEFAULT
    if kind == "bpe":
        frontend = BpeFrontEnd(BpeSpec(vocabulary=400), LOSSLESS["as trained here"])
    text = "a" + piece * (10_000_000 // len(piece))
    began = time.process_time()
    row = frontend.encode(text)
    assert time.process_time() - began < 0.5  # uncut: 3 to 10 s
    assert row.truncated or not text[1:].strip()
