"""The options of a network and of a training run: two frozen, checked records, and their defaults.

The default number of epochs depends on the number of training rows: see `TrainConfig.epochs_for`.
Knows no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any, Literal

from evalmode.model.exact.formats import require_exact_sizes

# A run without --epochs reads about this many rows in all. The default data set then gets two
# epochs, as measured in docs/decisions.md, and a smaller one more, up to the maximum.
DEFAULT_ROWS_READ = 225_000
DEFAULT_EPOCHS_MIN = 2
DEFAULT_EPOCHS_MAX = 20


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of the network, and the drop probability of each site.

    vocabulary          rows of the embedding table; id 0 is padding
    labels              number of classes
    positions           the longest sequence that the network accepts
    ids_per_position    ids summed into one position: 1 for tokens, more for hashed n-grams
    arithmetic          exact: the network of model/exact, whose sizes are limited
    weight_bits         bits of a weight in exact arithmetic, 7 or 8

    Raises ValueError, naming the key and the value, for values that make no network.
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
    arithmetic: Literal["float32", "exact"] = "float32"
    weight_bits: int = 8

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "positions", "ids_per_position")
        for key in (*sizes, "width", "layers", "heads", "feed_forward"):
            _require(getattr(self, key) >= 1, self, key, "at least 1")
        _require(self.labels >= 2, self, "labels", "at least 2: a classifier needs two classes")
        _require(self.width % self.heads == 0, self, "heads", f"a divisor of width={self.width}")
        kinds = ("inverted", "classic")
        _require(self.dropout_kind in kinds, self, "dropout_kind", "inverted or classic")
        _require_rates(self)
        _require_arithmetic(self)
        if self.arithmetic == "exact":
            require_exact_sizes(
                width=self.width,
                heads=self.heads,
                feed_forward=self.feed_forward,
                positions=self.positions,
                ids_per_position=self.ids_per_position,
                weight_bits=self.weight_bits,
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: its data, its network and its schedule.

    Most fields are a flag of `evalmode train`.

    data                `languages`, or the path of a CSV, TSV, JSONL or Parquet file
    text_column         None: the first usual name that the file has; label_column likewise
    separator           the separator of a CSV or TSV file; None: the one of the file's ending
    frontend            auto: ngrams for languages, bpe for a file
    vocabulary          rows of the embedding table; None: the default of the front end
    feed_forward        None: twice the width
    dropout             drop probability of each site whose own rate is None
    ngram_dropout       drop probability of single ids of a position; for n-grams only
    crop                share of the training rows that an epoch crops at random
    informed_table      start the embedding table from label counts instead of noise
    arithmetic          exact: logits with the same bits on every machine, see model/exact
    weight_bits         bits of a weight in exact arithmetic, 7 or 8
    epochs              None: by the number of training rows, see `epochs_for`
    patience            epochs without a lower validation loss before the training stops
    max_minutes         time limit; the result then depends on the clock as well as on the seed
    batch_rows          rows of a batch, in each process
    save_steps          steps between two saved states from which a killed run resumes
    threads             CPU threads; with 1 the bits do not depend on the number of cores

    Raises ValueError, naming the key and the value, for values that make no training.
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
    arithmetic: Literal["float32", "exact"] = "float32"
    weight_bits: int = 8

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
    # A small network is no faster with 2 threads, and much slower beside busy neighbours.
    threads: int = 1
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for key in ("patience", "batch_rows", "save_steps", "threads", "devices", "nodes"):
            _require(getattr(self, key) >= 1, self, key, "at least 1")
        for key in ("epochs", "feed_forward"):
            value = getattr(self, key)
            _require(value is None or value >= 1, self, key, "at least 1")
        for key in ("weight_decay", "warmup_steps", "seed"):
            _require(getattr(self, key) >= 0, self, key, "at least 0")
        for key in ("learning_rate", "clip_norm"):
            _require(getattr(self, key) > 0, self, key, "more than 0")
        # The table needs id 0, padding, and at least one id of a text.
        _require(self.vocabulary is None or self.vocabulary >= 2, self, "vocabulary", "at least 2")
        has_time = self.max_minutes is None or self.max_minutes > 0
        _require(has_time, self, "max_minutes", "more than 0")
        if self.separator not in (None, "tab", "\\t"):
            is_separator = len(self.separator) == 1 and self.separator not in '"\r\n\0'
            rule = "one character, and no quotation mark or line break, or tab"
            _require(is_separator, self, "separator", rule)
        _require(0.0 <= self.crop <= 1.0, self, "crop", "a share in [0, 1]")
        frontends = ("auto", "ngrams", "bpe")
        _require(self.frontend in frontends, self, "frontend", "auto, ngrams or bpe")
        _require_rates(self)
        _require_arithmetic(self)
        # The network checks its own fields. Build one now, so that a wrong width or number of heads
        # is refused before the data is read.
        self.network(vocabulary=self.vocabulary or 2, labels=2, positions=1, ids_per_position=1)

    def epochs_for(self, train_rows: int) -> int:
        """The largest number of epochs of a run with `train_rows` rows to train on.

        This is `epochs`, or by default as many as read DEFAULT_ROWS_READ rows in all, between
        DEFAULT_EPOCHS_MIN and DEFAULT_EPOCHS_MAX. `patience` and `max_minutes` may end it earlier.

        >>> TrainConfig().epochs_for(75_000), TrainConfig().epochs_for(1_000)
        (3, 20)
        """
        if self.epochs is not None:
            return self.epochs
        epochs = round(DEFAULT_ROWS_READ / train_rows)
        return min(DEFAULT_EPOCHS_MAX, max(DEFAULT_EPOCHS_MIN, epochs))

    def network(
        self, *, vocabulary: int, labels: int, positions: int, ids_per_position: int
    ) -> TransformerConfig:
        """The shape of the network for data with so many ids and labels."""
        rates = {}
        for site in ("embedding", "attention", "residual", "feed_forward"):
            rate = getattr(self, f"{site}_dropout")
            rates[f"{site}_dropout"] = self.dropout if rate is None else rate
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
            # A position of a single id would vanish with it.
            ngram_dropout=self.ngram_dropout if ids_per_position > 1 else 0.0,
            arithmetic=self.arithmetic,
            weight_bits=self.weight_bits,
            **rates,
        )

    def record(self) -> dict[str, Any]:
        """The options as a checkpoint stores them, which a run that continues another must share.

        They hold no path and no clock: the same training gives the same bytes anywhere. Nor do they
        hold the separator: it decides what is read, and the sha256 of that is compared as well.
        """
        options = asdict(self)
        del options["max_minutes"], options["separator"]
        # As before there were others, so that the same training gives the same digest.
        if self.arithmetic == "float32":
            del options["arithmetic"], options["weight_bits"]
        return options | {"data": PurePath(self.data).name}


def _require(condition: bool, config: object, key: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {rule}, got {key}={getattr(config, key)!r}")


def _require_rates(config: TransformerConfig | TrainConfig) -> None:
    for field in fields(config):
        if field.name.endswith("dropout"):
            rate = getattr(config, field.name)
            is_rate = rate is None or 0.0 <= rate < 1.0  # NaN fails the comparison too
            _require(is_rate, config, field.name, "a drop probability in [0, 1)")


def _require_arithmetic(config: TransformerConfig | TrainConfig) -> None:
    kinds = ("float32", "exact")
    _require(config.arithmetic in kinds, config, "arithmetic", "float32 or exact")
    _require(config.weight_bits in (7, 8), config, "weight_bits", "7 or 8")
    needs_exact = config.arithmetic == "exact" or config.weight_bits == 8
    _require(needs_exact, config, "weight_bits", "8 unless arithmetic is exact")
