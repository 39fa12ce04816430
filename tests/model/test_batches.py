"""The order of the rows: all of them, each once, the same for the same (seed, epoch), wherever a
run goes on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalmode.bundle.frontend import BpeSpec, NgramFrontEnd, NgramSpec
from evalmode.model.batches import Batches, crop, encode

SPEC = NgramSpec(vocabulary=500, lengths=(2, 4, 8))
FRONTEND = NgramFrontEnd(SPEC)
TEXTS = [f"{'word ' * (n % 7)}{n}" for n in range(103)]


def batches(**options) -> Batches:
    # a row's label is its number, to know it again
    rows = encode(TEXTS, range(len(TEXTS)), frontend=FRONTEND)
    return Batches(rows, **({"spec": SPEC, "batch_rows": 8, "seed": 3} | options))


def taken(loader: Batches) -> list[torch.Tensor]:
    return [torch.cat([batch["labels"], batch["input_ids"].flatten()]) for batch in loader]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_an_encoded_row_is_what_the_front_end_gave():
    rows = encode(TEXTS, [0] * len(TEXTS), frontend=FRONTEND)
    for number in (0, 5, 102):
        assert np.array_equal(rows[number], FRONTEND.encode(TEXTS[number]).ids)
        assert np.array_equal(rows.take(np.array([3, number]))[1], rows[number])


def test_an_epoch_reads_every_row_once_and_rows_of_like_length_together():
    loader = batches()
    seen = [batch["labels"] for batch in loader]
    assert sorted(torch.cat(seen).tolist()) == list(range(103))
    assert [len(labels) for labels in seen].count(8) == len(loader) - 1
    lengths = loader.rows.lengths
    assert np.mean([np.ptp(lengths[labels.numpy()]) for labels in seen]) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    one, other = batches(crop=0.5), batches(crop=0.5)
    first, second = taken(one), taken(one)
    assert not same(first, second)
    assert same(first, taken(other))
    assert same(second, taken(other))
    assert not same(first, taken(batches(crop=0.5, seed=4)))


@pytest.mark.parametrize("consumed", [0, 1, 5, 13, 14, 20])
def test_a_resumed_reader_gives_the_rest_and_not_a_batch_twice(consumed):
    whole = batches(crop=0.5)
    everything = [*taken(whole), *taken(whole)]
    resumed = batches(crop=0.5)
    resumed.load_state_dict({"taken": consumed})
    rest = taken(resumed)
    assert resumed.state_dict()["taken"] % len(resumed) == 0
    assert same(rest, everything[consumed : consumed + len(rest)])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_read_equally_many_batches_and_no_row_twice(world):
    loaders = [batches(rank=rank, world=world) for rank in range(world)]
    seen = [[batch["labels"] for batch in loader] for loader in loaders]
    assert {len(own) for own in seen} == {len(loaders[0])}
    rows = torch.cat([labels for own in seen for labels in own]).tolist()
    assert len(rows) == len(set(rows)) >= 103 - 8 * (world - 1)


def test_a_cropped_text_is_a_piece_of_it_with_the_n_grams_it_had():
    text = "a text of some length, to cut"
    ids = FRONTEND.encode(text).ids
    whole = ids.reshape(-1, SPEC.orders).tolist()
    lengths = set()
    for seed in range(50):
        cut = crop(ids, spec=SPEC, draw=np.random.default_rng(seed))
        piece = [gram for gram in cut.reshape(-1, SPEC.orders).tolist() if gram[0]]
        lengths.add(len(piece))
        assert any(whole[start : start + len(piece)] == piece for start in range(len(whole)))
        assert cut.shape[1] == ids.shape[1]
    assert min(lengths) >= 15
    assert len(lengths) > 5


def test_a_cropped_row_of_tokens_keeps_its_first_and_never_vanishes():
    spec = BpeSpec(vocabulary=300)
    for length in (1, 2, 9):
        ids = np.arange(1, length + 1)
        for seed in range(20):
            cut = crop(ids, spec=spec, draw=np.random.default_rng(seed))
            assert cut[0] == 1
            assert len(cut) >= min(length, 1 + length // 2)


def test_an_empty_text_can_be_cropped():
    ids = FRONTEND.encode("").ids
    assert np.array_equal(crop(ids, spec=SPEC, draw=np.random.default_rng(0)), ids)
