"""Which front end a run trains with, and the training of a byte-level BPE tokenizer on its texts.

The result is a spec and, for BPE, the text of a `tokenizer.json`: what bundle/frontend.py opens.
Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from evalmode.bundle.frontend import BpeSpec, FrontEndSpec, NgramSpec
from evalmode.model.config import TrainConfig
from evalmode.model.data import LANGUAGES
from evalmode.model.data_set import DataSet

PADDING, START = "[PAD]", "[START]"
# What a tokenizer learns of one text. The model reads 128 tokens: a text that fits is longer only
# where its tokens have more than 64 code points each. A merge costs a pass over each word that it
# is found in, so one word of 120,000 letters took 20 s.
LEARNED_POINTS = 8_192
# Tokens of thousands of bytes would let a text of megabytes fit: it would have to be read whole.
LONGEST_TOKEN = 1_024
# n-grams are hashed and collide: with 65,536 rows the languages' test came to .959, with 32,768 to
# .953 (one seed).
NGRAM_VOCABULARY, BPE_VOCABULARY = 65_536, 8_192


def choose_frontend(config: TrainConfig, data: DataSet) -> tuple[FrontEndSpec, str | None]:
    """The spec that `config` asks for, and the tokenizer trained on the training texts where it
    needs one.
    """
    kind = config.frontend
    if kind == "auto":
        kind = "ngrams" if config.data == LANGUAGES else "bpe"
    if kind == "ngrams":
        return NgramSpec(vocabulary=config.vocabulary or NGRAM_VOCABULARY), None
    return train_bpe(data.train.texts, vocabulary=config.vocabulary or BPE_VOCABULARY)


def train_bpe(texts: Iterable[str], *, vocabulary: int) -> tuple[BpeSpec, str]:
    """A byte-level BPE of at most `vocabulary` tokens (Sennrich et al. 2016; bytes as in GPT-2),
    and its spec.

    The same texts give the same tokenizer, byte for byte. Every text can be written in it: its
    first tokens are the 256 bytes, after id 0, padding, and id 1, the start of a row. Of a text it
    learns the first LEARNED_POINTS code points, and no token of more than LONGEST_TOKEN bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PADDING, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=LONGEST_TOKEN,
    )
    tokenizer.train_from_iterator((text[:LEARNED_POINTS] for text in texts), trainer=trainer)
    described = json.loads(tokenizer.to_str())
    # A special token is found in a user's text too: a text that says "[PAD]" would become padding.
    # The ids stay taken.
    described["added_tokens"] = []
    tokens = described["model"]["vocab"]
    assert (tokens[PADDING], tokens[START]) == (0, 1), "the first two ids are the special ones"
    return BpeSpec(vocabulary=len(tokens), start=1), json.dumps(
        described, ensure_ascii=False, indent=1
    )
