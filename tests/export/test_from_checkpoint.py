"""`evalmode export` on checkpoints: a clean module becomes a bundle, and a leak is refused by the
name of its site, without any file.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path

import onnx
import onnxscript
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.frontend import NgramSpec
from evalmode.bundle.store import open_bundle
from evalmode.errors import EvalmodeError
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.export.release import ExportRefused, Released
from evalmode.model.checkpoint import Checkpoint
from evalmode.model.dropout import Dropout
from evalmode.model.transformer import Transformer
from tests.conftest import make_checkpoint, small_config

# The bundle that an earlier evalmode wrote of the checkpoint in tests/conftest.py.
RECORDED = Path(__file__).parents[1] / "bundle" / "written_by" / "schema_1" / "small" / "1"
RECORDED_DIGEST = "7f75f1aa87a1f91830aaf8c2d8c086b6fbcc302107322b0ef4b05c2dc0214f8f"
SITES = [
    name for name, part in Transformer(small_config()).named_modules() if isinstance(part, Dropout)
]


class AlwaysTraining(nn.Dropout):
    """A common way to get Monte Carlo dropout, which is then forgotten in production."""

    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


class ForgetsTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.25)


class HidesInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drops = [nn.Dropout(0.25)]

    def forward(self, x: Tensor) -> Tensor:
        return self.drops[0](x)


class LeaksInAttention(nn.Module):
    """The most frequent bug of this kind: SDPA applies the rate in eval mode too, since it cannot
    know the mode of the module.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)


def release(checkpoint: Checkpoint, root: Path) -> Released:
    return release_checkpoint(
        checkpoint, root=root, name="leak", version="1", progress=lambda step: None
    )


def refusal_of(checkpoint: Checkpoint, root: Path) -> ExportRefused:
    with pytest.raises(ExportRefused) as caught:
        release(checkpoint, root)
    assert list(root.iterdir()) == [], "a refusal writes nothing"
    return caught.value


def replace_site(checkpoint: Checkpoint, site: str, part: nn.Module) -> Checkpoint:
    parent, _, name = site.rpartition(".")
    setattr(checkpoint.module.get_submodule(parent), name, part)
    return checkpoint


def test_the_network_has_ten_sites() -> None:
    assert len(SITES) == 2 + 4 * 2


@pytest.mark.parametrize("site", SITES)
def test_a_site_in_training_is_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, site: str
) -> None:
    error = refusal_of(replace_site(checkpoint, site, AlwaysTraining(0.25)), tmp_path)
    assert f"{site} (AlwaysTraining)" in str(error)
    assert {"escaped-module", "eager-randomness"} == {
        record.rule for record in error.records if record.verdict is Verdict.FAIL
    }


@pytest.mark.parametrize(
    "part", [ForgetsTraining(), LeaksInAttention()], ids=lambda part: type(part).__name__
)
@pytest.mark.parametrize("site", ["embedding.dropout", "blocks.1.feed_forward.dropout"])
def test_a_functional_dropout_without_its_flag_is_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, site: str, part: nn.Module
) -> None:
    error = refusal_of(replace_site(checkpoint, site, part), tmp_path)
    assert f"{site} ({type(part).__name__}, p=0.25)" in str(error)
    assert "test_from_checkpoint.py:" in str(error)


def test_a_dropout_in_a_list_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    error = refusal_of(
        replace_site(checkpoint, "blocks.0.attention.dropout", HidesInAList()), tmp_path
    )
    assert "blocks.0.attention.dropout.drops[0] (Dropout)" in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "--name must be .*'a/b'"),
        ({"name": ""}, "--name"),
        ({"version": "../1"}, "--version must be"),
    ],
)
def test_an_invalid_name_or_version_is_refused_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    steps: list[str] = []
    with pytest.raises(EvalmodeError, match=message):
        release_checkpoint(
            checkpoint,
            root=tmp_path,
            progress=steps.append,
            **{"name": "any", "version": "1", **arguments},
        )
    assert steps == []


@pytest.mark.parametrize("root", ["file", "file/below", "/proc/bundles"])
def test_an_unwritable_root_is_refused_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path, root: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    steps: list[str] = []
    with pytest.raises(EvalmodeError, match=f"no bundle can be written to .*{root}: "):
        release_checkpoint(
            checkpoint, root=tmp_path / root, name="any", version="1", progress=steps.append
        )
    assert steps == []


def test_a_checkpoint_without_held_out_rows_is_refused_in_one_sentence(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    empty = dataclasses.replace(checkpoint.held_out, rows=[], labels=checkpoint.held_out.labels[:0])
    with pytest.raises(EvalmodeError, match="holds no held-out rows"):
        release(dataclasses.replace(checkpoint, held_out=empty), tmp_path)


def test_a_module_that_is_not_finite_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with torch.no_grad():
        checkpoint.module.head.bias[0] = float("nan")
    assert "non-finite" in str(refusal_of(checkpoint, tmp_path))


def test_a_graph_that_differs_from_its_module_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    class Exchanged(Checkpoint):
        def folded(self) -> Transformer:
            module = Transformer(self.module.config)
            module.load_state_dict(self.module.state_dict())
            with torch.no_grad():
                module.head.weight.mul_(1.001)
            return module

    fields = {
        field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)
    }
    assert "parity" in str(refusal_of(Exchanged(**fields), tmp_path))


def test_a_clean_module_becomes_a_bundle_that_opens(released: Released) -> None:
    bundle = open_bundle(released.path)
    assert bundle.certificate is not None
    assert bundle.certificate.verdict is Verdict.PASS
    assert {record.rule for record in bundle.certificate.records} >= {
        "escaped-module",
        "eager-randomness",
        "stochastic-op",
        "training-mode",
        "census",
        "parity",
        "repeatability",
        "batch-invariance",
        "held-out",
    }


def test_the_census_names_every_site_with_its_rate_and_shows_it_absent(released: Released) -> None:
    (census,) = [record for record in released.certificate.records if record.rule == "census"]
    rates = {"embedding.ngram_dropout": 0.3}
    assert set(census.sites) == {
        f"{site} (Dropout, p={rates.get(site, 0.1)}): absent" for site in SITES
    }


def test_classic_dropout_is_folded_and_leaves_no_node(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Transformer(small_config(dropout_kind="classic"))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (census,) = [
        record
        for record in release(make_checkpoint(module), tmp_path).certificate.records
        if record.rule == "census"
    ]
    assert census.verdict is Verdict.PASS
    assert len(census.sites) == len(SITES)


def test_a_causal_network_without_any_rate_is_exported_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    off = dict.fromkeys(("embedding", "attention", "residual", "feed_forward", "ngram"), 0.0)
    module = Transformer(
        small_config(causal=True, **{f"{name}_dropout": rate for name, rate in off.items()})
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert release(make_checkpoint(module), tmp_path).certificate.verdict is Verdict.PASS


def test_the_same_checkpoint_gives_the_same_digest(
    checkpoint: Checkpoint, released: Released, tmp_path: Path
) -> None:
    second = release_checkpoint(
        checkpoint, root=tmp_path, name="small", version="1", progress=lambda step: None
    )
    assert second.certificate.digest == released.certificate.digest


def test_the_digest_of_a_seeded_checkpoint_is_the_recorded_one(released: Released) -> None:
    recorded = open_bundle(RECORDED)
    assert recorded.certificate is not None
    assert isinstance(recorded.manifest.frontend, NgramSpec)
    # Everything besides the checkpoint and evalmode's code that the digest depends on.
    written_by = {
        **recorded.manifest.provenance["export"],
        "unicode": recorded.manifest.frontend.unicode,
        "platform": recorded.certificate.platform,
    }
    here = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "unicode": unicodedata.unidata_version,
        "platform": released.certificate.platform,
    }
    if here != written_by:
        pytest.skip(f"the digest is recorded for {written_by}, and this is {here}")
    assert released.certificate.digest == RECORDED_DIGEST
