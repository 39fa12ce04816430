"""The first step of a training: from the options to encoded data and a front end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalmode.bundle.frontend import FrontEndSpec, NgramFrontEnd, NgramSpec, open_frontend
from evalmode.model.batches import Rows
from evalmode.model.config import TrainConfig, TransformerConfig
from evalmode.model.data import LANGUAGES, composed_digest, open_data
from evalmode.model.data_set import DataSet
from evalmode.model.encoding import drop_duplicates, encode_parts
from evalmode.model.tokenizer_training import NGRAM_VOCABULARY, choose_frontend
from evalmode.model.unlabelled import with_unlabelled

# The export computes known answers for the sample texts of a checkpoint. They are the unusual texts
# here, and the first test text of up to SAMPLE_LABELS labels, cut to SAMPLE_CODE_POINTS.
UNUSUAL_TEXTS = ("", " ", "12:30", "?!", "👩‍👩‍👧 \u200d", "A", "\ud800", "word " * 400)
SAMPLE_LABELS, SAMPLE_CODE_POINTS = 24, 8_192


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready to train: its options, its encoded data and its front end.

    It does not keep the texts: the network reads only their first tokens, and long texts take much
    memory (one emoji makes Python store a text of 20 MB in 80 MB).

    data_rows       number of training rows with a label
    sample_texts    texts for the known answers of the export, each cut to SAMPLE_CODE_POINTS
    spec            the front end
    tokenizer       the text of tokenizer.json; None for n-grams
    """

    config: TrainConfig
    data_name: str
    data_sha256: str
    data_rows: int
    labels: tuple[str, ...]
    sample_texts: tuple[str, ...]
    spec: FrontEndSpec
    tokenizer: str | None
    train: Rows
    validation: Rows
    test: Rows

    @property
    def record(self) -> dict[str, Any]:
        """The options and the data that a run must share to continue another one."""
        return self.config.record() | {"data_sha256": self.data_sha256}

    @property
    def network_config(self) -> TransformerConfig:
        """The shape of the network for this data."""
        return self.config.network(
            vocabulary=self.spec.vocabulary,
            labels=len(self.labels),
            positions=self.spec.lengths[-1],
            ids_per_position=self.spec.ids_per_position,
        )


def prepare(
    config: TrainConfig, *, cache: Path, show_data: Callable[[DataSet], None] | None
) -> PreparedRun:
    """Read the data, train the front end on it, and encode the texts."""
    data = open_data(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        separator=config.separator,
        cache=cache,
        identity=_text_identity(config),
    )
    # Texts without letters, such as "12:30", in the training part and without a label. From them
    # the network learns to give every class the same score where a text says nothing.
    data = with_unlabelled(data)
    spec, tokenizer = choose_frontend(config, data)
    rows = encode_parts(data, open_frontend(spec, tokenizer))
    # The default data set stays as it is: dropping rows would change the published figures.
    if config.data != LANGUAGES:
        data, rows = drop_duplicates(data, rows)
    if show_data is not None:
        show_data(data)

    # The first test text of each label, for the labels that come first in the alphabet.
    first_texts: dict[str, str] = {}
    for text, label in zip(data.test.texts, data.test.labels, strict=True):
        first_texts.setdefault(label, text)
    sample_labels = sorted(first_texts)[:SAMPLE_LABELS]
    sample_texts = [first_texts[label][:SAMPLE_CODE_POINTS] for label in sample_labels]

    return PreparedRun(
        config=config,
        data_name=data.name,
        data_sha256=data.sha256,
        data_rows=len(data.train.texts),
        labels=data.labels,
        sample_texts=(*UNUSUAL_TEXTS, *sample_texts),
        spec=spec,
        tokenizer=tokenizer,
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
    )


def _text_identity(config: TrainConfig) -> Callable[[str], bytes]:
    """A function from a text to a digest. Texts with the same digest count as one in `open_data`.

    A model cannot distinguish texts with the same ids. If one were in the training part and another
    in the test part, the accuracy on the test part would be too high.
    """
    # The tokenizer is not trained yet, so characters are compared here. `drop_duplicates` compares
    # the ids later.
    if config.frontend != "ngrams":
        return composed_digest

    # The ids of n-grams need no training.
    frontend = NgramFrontEnd(NgramSpec(vocabulary=config.vocabulary or NGRAM_VOCABULARY))

    def ids_digest(text: str) -> bytes:
        return hashlib.sha256(frontend.encode(text).ids.tobytes()).digest()

    return ids_digest
