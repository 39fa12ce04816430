"""Positions are padding if the module takes no account of them, whatever a mask marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.known_answers import Tensors
from evalmode.export.certify import subject_of
from evalmode.export.inputs.padding import padding_at
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import parity

IDS = np.array([[5, 7, 9, 0, 0], [4, 6, 8, 2, 3]])
MASK = (IDS != 0).astype(np.int64)
AT_PADDING = IDS == 0


def with_mask(inputs: Tensors) -> Tensors:
    """The running sum of the values that the mask keeps; at padding, the value there."""
    values, mask = inputs["x"].astype(np.float32), inputs["mask"]
    return {"y": (values * mask).cumsum(1) + values * (1 - mask)}


def ignoring_mask(inputs: Tensors) -> Tensors:
    """A running sum of all values: the mask is read and excludes nothing."""
    return {"y": inputs["x"].astype(np.float32)[:, ::-1].cumsum(1) + inputs["mask"]}


def test_positions_that_a_mask_excludes_are_padding() -> None:
    padding = padding_at(with_mask, {"x": IDS + 3, "mask": MASK}, AT_PADDING, 1e-5)
    assert padding is not None
    assert padding.mask == "mask"
    assert np.array_equal(padding.positions, AT_PADDING)
    inverted = padding_at(
        lambda inputs: with_mask({**inputs, "mask": 1 - inputs["mask"]}),
        {"x": IDS + 3, "mask": 1 - MASK},
        AT_PADDING,
        1e-5,
    )
    assert inverted is not None, "a mask may also mark the excluded positions"


def test_all_padding_is_returned_for_a_part_of_it() -> None:
    some = AT_PADDING.copy()
    some[0, 3] = False
    padding = padding_at(with_mask, {"x": IDS + 3, "mask": MASK}, some, 1e-5)
    assert padding is not None
    assert np.array_equal(padding.positions, AT_PADDING)


def test_positions_that_the_module_reads_are_no_padding() -> None:
    inputs = {"x": IDS + 3, "mask": MASK}
    assert padding_at(ignoring_mask, inputs, AT_PADDING, 1e-5) is None
    assert padding_at(with_mask, inputs, ~AT_PADDING, 1e-5) is None, "these count"
    both = AT_PADDING.copy()
    both[0, 0] = True
    assert padding_at(with_mask, inputs, both, 1e-5) is None, "one of them counts"


def test_positions_are_no_padding_if_the_module_refuses_other_values_there() -> None:
    inputs = {"x": np.where(AT_PADDING, 0, IDS), "mask": (~AT_PADDING).astype(np.int64)}

    def refuses(inputs: Tensors) -> Tensors:
        if (inputs["x"] != 0)[AT_PADDING].any():
            raise ValueError("padding must be 0")
        return with_mask(inputs)

    assert padding_at(with_mask, inputs, AT_PADDING, 1e-5) is not None
    assert padding_at(refuses, inputs, AT_PADDING, 1e-5) is None


def by_id(inputs: Tensors) -> Tensors:
    ids = inputs["ids"]
    return with_mask({"x": ids, "mask": (ids != 0).astype(np.int64)})


def test_an_id_marks_padding_if_rows_without_it_get_the_same_answers() -> None:
    assert padding_at(by_id, {"ids": IDS}, AT_PADDING, 1e-5) is not None
    padded_left = np.ascontiguousarray(IDS[:, ::-1])
    assert padding_at(by_id, {"ids": padded_left}, padded_left == 0, 1e-5) is not None

    def with_length(inputs: Tensors) -> Tensors:
        return {"y": by_id(inputs)["y"] + inputs["ids"].shape[1]}

    assert padding_at(with_length, {"ids": IDS}, AT_PADDING, 1e-5) is None


class Encoder(nn.Module):
    """nn.TransformerEncoder with a padding mask: its fast path answers 0 at padding."""

    def __init__(self, pooled: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.pooled = nn.Embedding(50, 16), pooled
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.table(ids), src_key_padding_mask=mask == 0)
        if self.pooled == "all":
            return hidden.mean(1)
        if self.pooled == "first":
            return hidden[:, 0]
        return hidden


class AttendsToNothing(nn.Module):
    """Causal attention over rows padded on the left: padding may attend to nothing."""

    def __init__(self, *, heads_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.heads_first = nn.Embedding(50, 8), heads_first

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)[:, None]
        length = ids.shape[1]
        allowed = (
            torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        )
        y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed)
        return y if self.heads_first else y[:, 0]


def batches(*, pads_left: bool) -> list[dict[str, Tensor]]:
    samples = []
    for rows, length in ((3, 8), (2, 11)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, :3] = 0
        ids = torch.randint(5, 50, (rows, length))
        samples.append({"ids": ids, "mask": mask if pads_left else mask.flip(1)})
    return samples


def record_of(module: nn.Module, samples: list[dict[str, Tensor]]) -> Record:
    return parity.check(subject_of(candidate_of(module.eval(), samples)))


@pytest.mark.parametrize(
    ("module", "pads_left"),
    [
        (Encoder("none"), False),
        (AttendsToNothing(heads_first=False), True),
        (AttendsToNothing(heads_first=True), True),
    ],
)
def test_a_difference_at_padding_alone_is_a_warning_that_names_it(
    module: nn.Module, pads_left: bool
) -> None:
    record = record_of(module, batches(pads_left=pads_left))
    assert record.verdict is Verdict.PASS
    (warning,) = record.findings
    assert warning.why.endswith("standard deviations: mask marks all of these as padding")
    assert "under torch.inference_mode() with PyTorch's fast path" in record.why


def test_a_difference_at_padding_that_no_answer_shows_is_not_reported() -> None:
    record = record_of(Encoder("first"), batches(pads_left=False))
    assert record.verdict is Verdict.PASS
    assert not record.findings


def test_an_answer_that_depends_on_the_fast_path_at_padding_fails() -> None:
    record = record_of(Encoder("all"), batches(pads_left=False))
    assert record.verdict is Verdict.FAIL
    assert "comes from PyTorch's fast path" in record.findings[0].fix


def test_the_module_is_compared_with_the_fast_path_as_the_user_set_it() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert record_of(Encoder("all"), batches(pads_left=False)).verdict is Verdict.PASS
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
