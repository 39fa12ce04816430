"""Networks of Hugging Face: attention passes its rate to a function, and one has a cache."""

from __future__ import annotations

import pytest
import torch

from evalmode.bundle.certificate import Verdict
from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind
from tests.export.hugging_face import bart, bert, gpt2, inputs, wav2vec2, waves


@pytest.mark.parametrize(("build", "sites"), [(bert, 5), (gpt2, 4)], ids=["bert", "gpt2"])
def test_every_site_of_a_hugging_face_network_is_inverted_dropout(
    build: object, sites: int
) -> None:
    result = audit(build(), inputs())  # type: ignore[operator]
    assert result.record.verdict is Verdict.PASS
    assert [site.kind for site in result.sites if site.kind is not Kind.NOT_CALLED] == [
        Kind.INVERTED
    ] * sites


def test_layers_that_are_skipped_and_masked_features_are_warnings() -> None:
    torch.manual_seed(0)
    result = audit(wav2vec2(), waves())
    assert result.record.verdict is Verdict.PASS
    kinds = [site.kind for site in result.sites]
    assert kinds[:2] == [Kind.AUGMENTED] * 2  # of time steps, and of features
    assert kinds.count(Kind.LAYERS_SKIPPED) == 1
    others = set(kinds) - {Kind.AUGMENTED, Kind.LAYERS_SKIPPED}
    assert others == {Kind.INVERTED, Kind.OFF}


def test_a_dropout_beside_layers_that_are_skipped_is_judged() -> None:
    torch.manual_seed(0)
    result = audit(bart(), inputs())
    assert result.record.verdict is Verdict.PASS
    for path in ("encoder", "decoder"):
        kinds = [site.kind for site in result.sites if site.path == path]
        assert kinds == [Kind.LAYERS_SKIPPED, Kind.INVERTED]
