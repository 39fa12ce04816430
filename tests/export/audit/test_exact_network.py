"""The audit of a network in exact arithmetic: it rounds in both modes, and only dropouts differ."""

from __future__ import annotations

import pytest
import torch

from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind
from evalmode.model.exact.network import ExactTransformer
from tests.conftest import small_config

# The four places of a dropout, as they are called in a network of two layers.
SITES = {
    "embedding.ngram_dropout",
    "embedding.dropout",
    *(f"blocks.{layer}.attention_dropout" for layer in range(2)),
    *(f"blocks.{layer}.feed_forward_dropout" for layer in range(2)),
    *(f"blocks.{layer}.attention.dropout" for layer in range(2)),
    *(f"blocks.{layer}.feed_forward.dropout" for layer in range(2)),
}


@pytest.mark.parametrize("weights", ["untrained", "large"])
@pytest.mark.parametrize("causal", [False, True])
def test_floors_and_tables_are_no_noise_and_every_dropout_is_inverted(
    weights: str, causal: bool
) -> None:
    torch.manual_seed(0)
    module = ExactTransformer(small_config(arithmetic="exact", causal=causal)).train()
    if weights == "large":
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0.0, 0.3)
            module.embedding.table.weight[0].zero_()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 512, (4, 9, 16), generator=draw)
    ids[1:, 7:] = 0

    result = audit(module, [{"input_ids": ids}])

    assert {site.path for site in result.sites} == SITES
    assert {site.kind for site in result.sites} == {Kind.INVERTED}
    record = result.record
    assert (record.verdict, record.findings) == ("pass", ())
    assert module.training
