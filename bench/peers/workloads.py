"""What is asked: a bundle, and the same items for every server.

The lengths of the items are log-normal, from 4 to 128 characters of a text or ids of a row: most
requests are short, and a few are long.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHORTEST, LONGEST = 4, 128
# The median length and the standard deviation of its logarithm.
MEDIAN_LENGTH, SIGMA = 30, 0.7
SEED = 0

NETWORK = Path(__file__).with_name("network.py")
VOCABULARY = 8192

SENTENCES = (
    "Az utazás hosszú volt, de az idő végig szép maradt, és estére mindenki megérkezett.",
    "De trein naar het noorden vertrekt vandaag vanaf een ander perron dan gisteren.",
    "Поезд отправляется через десять минут, и мест у окна уже почти не осталось.",
    "Save changes before closing the window, or they will be lost.",
    "これは短い文です。明日は雨が降るかもしれません。",
    "Le paquet est arrivé trop tard, et la facture n'était pas dans l'enveloppe.",
    "Der Drucker meldet einen Fehler, obwohl genug Papier eingelegt ist.",
    "El pedido se puede cambiar hasta que salga del almacén.",
    "Η βιβλιοθήκη κλείνει νωρίτερα το καλοκαίρι.",
    "Kokous siirtyy huomiseen, koska sali on varattu.",
    "Bu sayfa bulunamadı; adresi kontrol edip yeniden deneyin.",
    "Możesz zmienić hasło w ustawieniach swojego konta.",
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the items that are asked of it: texts, or rows of ids.

    `folder` is the bundle. Peers read its graph, its labels and the description of its front end.
    """

    name: str
    title: str
    folder: Path
    items: Sequence[Any]


def draw_lengths(count: int, rng: np.random.Generator) -> list[int]:
    """`count` log-normal lengths from SHORTEST to LONGEST."""
    lengths = rng.lognormal(np.log(MEDIAN_LENGTH), SIGMA, count)
    return [int(length) for length in lengths.clip(SHORTEST, LONGEST)]


def draw_texts(count: int) -> list[str]:
    """`count` texts, cut from sentences in turn."""
    rng = np.random.default_rng(SEED)
    texts = []
    for index, length in enumerate(draw_lengths(count, rng)):
        first = index % len(SENTENCES)
        joined = " ".join([*SENTENCES[first:], *SENTENCES[:first]])
        texts.append(joined[:length])
    return texts


def draw_rows(count: int) -> list[list[int]]:
    """`count` rows of ids from 1 to VOCABULARY - 1."""
    rng = np.random.default_rng(SEED)
    lengths = draw_lengths(count, rng)
    return [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]


def text_workload(bundle: Path, *, count: int) -> Workload:
    """The text classifier in the folder `bundle`. Raises ValueError for a bundle of tensors."""
    if json.loads((bundle / "manifest.json").read_text())["frontend"] is None:
        raise ValueError(f"{bundle} is a model of tensors: pass a bundle that classifies texts")
    return Workload(
        name="text",
        title=f"{bundle.parent.name}, one text a request",
        folder=bundle.resolve(),
        items=draw_texts(count),
    )


def rows_workload(build: Path, *, count: int) -> Workload:
    """A network of four layers and a width of 256, which is exported once below `build`."""
    # Another network is another folder, so that a stale export is never measured.
    digest = hashlib.sha256(NETWORK.read_bytes()).hexdigest()[:12]
    folder = build / "models" / digest
    if not (folder / "encoder" / "1" / "manifest.json").exists():
        command = [str(Path(sys.executable).with_name("evalmode")), "export", "network:build"]
        command += ["--inputs", "network:inputs", "--name", "encoder", "--out", str(folder)]
        paths = [str(NETWORK.parent), os.environ.get("PYTHONPATH", "")]
        export = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if export.returncode != 0:
            raise RuntimeError(f"the export of {NETWORK.name} failed:\n{export.stdout}")
    return Workload(
        name="rows",
        title="four layers of 256, one row of ids a request",
        folder=folder / "encoder" / "1",
        items=draw_rows(count),
    )
