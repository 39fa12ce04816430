"""Batches: every row once an epoch, in an order that depends on the seed and the epoch alone."""

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
    # The label of a row is its index, which identifies it in a batch.
    rows = encode(TEXTS, range(len(TEXTS)), frontend=FRONTEND)
    return Batches(rows, **({"spec": SPEC, "batch_rows": 8, "seed": 3} | options))


def tensors_of(loader: Batches) -> list[torch.Tensor]:
    return [torch.cat([batch["labels"], batch["input_ids"].flatten()]) for batch in loader]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_an_encoded_row_has_the_ids_of_the_front_end():
    rows = encode(TEXTS, [0] * len(TEXTS), frontend=FRONTEND)
    for index in (0, 5, 102):
        assert np.array_equal(rows[index], FRONTEND.encode(TEXTS[index]).ids)
        assert np.array_equal(rows.take(np.array([3, index]))[1], rows[index])


def test_an_epoch_has_every_row_once_and_batches_of_similar_length():
    loader = batches()
    batch_labels = [batch["labels"] for batch in loader]
    assert sorted(torch.cat(batch_labels).tolist()) == list(range(103))
    assert [len(labels) for labels in batch_labels].count(8) == len(loader) - 1
    lengths = loader.rows.lengths
    assert np.mean([np.ptp(lengths[labels.numpy()]) for labels in batch_labels]) <= 1


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    loader, second_loader = batches(crop=0.5), batches(crop=0.5)
    first_epoch, second_epoch = tensors_of(loader), tensors_of(loader)
    assert not all_equal(first_epoch, second_epoch)
    assert all_equal(first_epoch, tensors_of(second_loader))
    assert all_equal(second_epoch, tensors_of(second_loader))
    assert not all_equal(first_epoch, tensors_of(batches(crop=0.5, seed=4)))


@pytest.mark.parametrize("consumed", [0, 1, 5, 13, 14, 20])
def test_resumed_batches_are_exactly_the_remaining_ones(consumed):
    uninterrupted = batches(crop=0.5)
    two_epochs = [*tensors_of(uninterrupted), *tensors_of(uninterrupted)]
    resumed = batches(crop=0.5)
    resumed.load_state_dict({"taken": consumed})
    rest = tensors_of(resumed)
    assert resumed.state_dict()["taken"] % len(resumed) == 0
    assert all_equal(rest, two_epochs[consumed : consumed + len(rest)])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_read_equally_many_batches_and_no_row_twice(world):
    loaders = [batches(rank=rank, world=world) for rank in range(world)]
    labels_by_process = [[batch["labels"] for batch in loader] for loader in loaders]
    assert {len(batches_read) for batches_read in labels_by_process} == {len(loaders[0])}
    rows = torch.cat([torch.cat(batches_read) for batches_read in labels_by_process]).tolist()
    assert len(rows) == len(set(rows)) >= 103 - 8 * (world - 1)


def test_a_cropped_text_is_a_part_of_the_text_with_its_n_grams():
    text = "a text of some length, to cut"
    ids = FRONTEND.encode(text).ids
    grams = ids.reshape(-1, SPEC.orders).tolist()
    lengths = set()
    for seed in range(50):
        cut = crop(ids, spec=SPEC, draw=np.random.default_rng(seed))
        piece = [gram for gram in cut.reshape(-1, SPEC.orders).tolist() if gram[0]]
        lengths.add(len(piece))
        assert any(grams[start : start + len(piece)] == piece for start in range(len(grams)))
        assert cut.shape[1] == ids.shape[1]
    assert min(lengths) >= 15
    assert len(lengths) > 5


def test_a_cropped_row_of_tokens_has_its_first_token_and_half_of_the_others():
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
