"""What a network and a training run are: two frozen, checked records. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any, Literal


def _require(holds: bool, key: str, value: object, must: str) -> None:
    if not holds:
        raise ValueError(f"{key} must be {must}, got {key}={value!r}")


def _require_rates(config: object) -> None:
    for field in fields(config):  # type: ignore[arg-type]
        if field.name.endswith("dropout"):
            rate = getattr(config, field.name)
            if rate is not None:
                _require(0.0 <= rate < 1.0, field.name, rate, "a drop probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of the network, and a drop probability for each place where it drops.

    vocabulary          rows of the embedding table; id 0 is padding
    ids_per_position    ids summed into one position: 1 for tokens, more for hashed n-grams
    positions           the longest sequence it reads
    labels              classes it tells apart
    Raises ValueError, naming the key and the value, when built with nonsense.
    """

    vocabulary: int
    labels: int
    positions: int
    ids_per_position: int = 1
    width: int = 96
    layers: int = 3
    heads: int = 4
    feed_forward: int = 192
    causal: bool = False
    dropout_kind: Literal["inverted", "classic"] = "inverted"
    ngram_dropout: float = 0.0
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    feed_forward_dropout: float = 0.1

    def __post_init__(self) -> None:
        for key in (
            "vocabulary",
            "positions",
            "ids_per_position",
            "width",
            "layers",
            "heads",
            "feed_forward",
        ):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        _require(
            self.labels >= 2,
            "labels",
            self.labels,
            "at least 2: a classifier chooses between labels",
        )
        _require(
            self.width % self.heads == 0, "heads", self.heads, f"a divisor of width={self.width}"
        )
        _require(
            self.dropout_kind in ("inverted", "classic"),
            "dropout_kind",
            self.dropout_kind,
            "inverted or classic",
        )
        _require_rates(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: what it reads, what it builds, how it learns. Most fields are a flag of
    `evalmode train`.

    data                `languages`, or a CSV, TSV, JSONL or Parquet file
    text_column         None: the first of the usual names that the file has; so is label_column
    separator           what separates the columns of a CSV or TSV file; None: what its ending says
    frontend            auto: ngrams for languages, bpe for a file
    vocabulary          rows of the embedding table; None: 65,536 for ngrams, 8,192 for bpe
    feed_forward        None: twice the width
    dropout             drop probability of every place whose own rate is None
    ngram_dropout       drop probability of single ids of a position; ngrams alone have several
    crop                share of the training rows that an epoch reads a random piece of
    informed_table      start the embedding table from label counts (informed_table.py), not noise
    epochs              None: as many as show it 225,000 rows, at least 2 and at most 20
    patience            epochs without a lower validation loss before it stops
    max_minutes         stop by the clock; then the result is the clock's too, not the seed's alone
    batch_rows          rows a batch, in each process
    save_steps          steps between two states from which a killed run resumes
    threads             CPU threads. With 1 the bits do not depend on how many cores there are; a
                        small network is no faster with 2, and much slower beside busy neighbours
    Raises ValueError, naming the key and the value, when built with nonsense.
    """

    data: str = "languages"
    text_column: str | None = None
    label_column: str | None = None
    separator: str | None = None
    frontend: Literal["auto", "ngrams", "bpe"] = "auto"
    vocabulary: int | None = None

    width: int = 96
    layers: int = 3
    heads: int = 4
    feed_forward: int | None = None
    causal: bool = False
    dropout_kind: Literal["inverted", "classic"] = "inverted"
    dropout: float = 0.1
    embedding_dropout: float | None = None
    attention_dropout: float | None = None
    residual_dropout: float | None = None
    feed_forward_dropout: float | None = None
    ngram_dropout: float = 0.3
    crop: float = 0.0
    informed_table: bool = True

    epochs: int | None = None
    patience: int = 3
    max_minutes: float | None = None
    batch_rows: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    clip_norm: float = 1.0
    seed: int = 0

    save_steps: int = 200
    threads: int = 1
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for key in ("patience", "batch_rows", "save_steps", "threads", "devices", "nodes"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("epochs", "feed_forward"):
            value = getattr(self, key)
            _require(value is None or value >= 1, key, value, "at least 1")
        for key in ("weight_decay", "warmup_steps", "seed"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")
        for key in ("learning_rate", "clip_norm"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        _require(
            self.vocabulary is None or self.vocabulary >= 2,
            "vocabulary",
            self.vocabulary,
            "at least 2",
        )
        _require(
            self.max_minutes is None or self.max_minutes > 0,
            "max_minutes",
            self.max_minutes,
            "more than 0",
        )
        _require(
            self.separator in (None, "tab", "\\t")
            or (len(self.separator or "") == 1 and self.separator not in ('"', "\r", "\n", "\0")),
            "separator",
            self.separator,
            "one character, and no quotation mark or line break, or tab",
        )
        _require(0.0 <= self.crop <= 1.0, "crop", self.crop, "a share in [0, 1]")
        _require(
            self.frontend in ("auto", "ngrams", "bpe"),
            "frontend",
            self.frontend,
            "auto, ngrams or bpe",
        )
        _require_rates(self)
        # Built once to be refused now, not after the data was read: the rest are the network's own
        # rules.
        self.network(vocabulary=self.vocabulary or 2, labels=2, positions=1, ids_per_position=1)

    def network(
        self, *, vocabulary: int, labels: int, positions: int, ids_per_position: int
    ) -> TransformerConfig:
        """The network this run trains, once its data has said how many ids and labels there are."""
        rates = {
            key: self.dropout if getattr(self, key) is None else getattr(self, key)
            for key in (
                "embedding_dropout",
                "attention_dropout",
                "residual_dropout",
                "feed_forward_dropout",
            )
        }
        return TransformerConfig(
            vocabulary=vocabulary,
            labels=labels,
            positions=positions,
            ids_per_position=ids_per_position,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            feed_forward=self.feed_forward or 2 * self.width,
            causal=self.causal,
            dropout_kind=self.dropout_kind,
            ngram_dropout=self.ngram_dropout if ids_per_position > 1 else 0.0,
            **rates,
        )

    def record(self) -> dict[str, Any]:
        """What must agree for one run to continue another, and what a checkpoint keeps: no path,
        and no clock. The separator shows in what was read, whose sha256 is compared as well.
        """
        options = asdict(self)
        del options["max_minutes"], options["separator"]
        return options | {"data": PurePath(self.data).name}
