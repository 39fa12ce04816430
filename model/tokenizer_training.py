"""Chooses the front end of a run, and trains a byte-level BPE tokenizer on its texts.

The result is a spec and, for BPE, the text of a `tokenizer.json`. bundle/frontend.py opens both.
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
# A tokenizer learns from the first code points of each text. The model reads 128 tokens, so a text
# that fits is longer only if its tokens have more than 64 code points on average. Without a limit
# one word of 120,000 letters took 20 s, because each merge is a pass over all words that contain
# its pair.
LEARNED_POINTS = 8_192
# In bytes. With tokens of thousands of bytes a text of megabytes would fit into 128 tokens, and the
# service would have to read all of it.
LONGEST_TOKEN = 1_024
# n-grams are hashed and collide. The test accuracy of the default data set was 0.959 with 65,536
# table rows and 0.953 with 32,768 (one seed).
NGRAM_VOCABULARY, BPE_VOCABULARY = 65_536, 8_192


def choose_frontend(config: TrainConfig, data: DataSet) -> tuple[FrontEndSpec, str | None]:
    """The front end's spec for `config`, and the text of its tokenizer; None for n-grams.

    The tokenizer is trained on the training texts of `data`.
    """
    kind = config.frontend
    if kind == "auto":
        kind = "ngrams" if config.data == LANGUAGES else "bpe"
    if kind == "ngrams":
        return NgramSpec(vocabulary=config.vocabulary or NGRAM_VOCABULARY), None
    return train_bpe(data.train.texts, vocabulary=config.vocabulary or BPE_VOCABULARY)


def train_bpe(texts: Iterable[str], *, vocabulary: int) -> tuple[BpeSpec, str]:
    """Train a byte-level BPE tokenizer; return its spec and the text of its `tokenizer.json`.

    The algorithm is that of Sennrich et al. 2016, on bytes as in GPT-2. There are at most
    `vocabulary` tokens, of at most LONGEST_TOKEN bytes: id 0 is padding, id 1 starts a row, and the
    256 bytes follow, so that each text can be encoded. Only the first LEARNED_POINTS code points of
    a text are learned. The same texts give the same tokenizer, byte for byte.

        spec, tokenizer = train_bpe(["a text", "another text"], vocabulary=300)
        ids = open_frontend(spec, tokenizer).encode("a text").ids
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

    # tokenizers recognises added tokens in a user's text as well: the text "[PAD]" would become
    # padding. Without the entries it is plain text, and the vocabulary still reserves their ids.
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    ids = description["model"]["vocab"]
    assert (ids[PADDING], ids[START]) == (0, 1), "the first two ids are the special ones"
    spec = BpeSpec(vocabulary=len(ids), start=1)
    return spec, json.dumps(description, ensure_ascii=False, indent=1)
