"""Bundles of networks of the default sizes: exact ones, and one of float32 to compare with.

A network that rounds shows that a test can fail: other machines give it other bits.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from evalmode.bundle.store import open_bundle
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.model.checkpoint import Checkpoint
from evalmode.model.networks import network_of
from tests.conftest import make_checkpoint, small_config

# The path of an exact bundle that the tests run as well, such as a trained one.
BUNDLE_VARIABLE = "EVALMODE_EXACT_BUNDLE"

LABELS = 60
DEFAULT_SIZES = {"width": 96, "layers": 3, "heads": 4, "feed_forward": 192, "labels": LABELS}


def drawn_checkpoint(**changes: object) -> Checkpoint:
    """A checkpoint of a network with random weights; `changes` are fields of its shape."""
    config = small_config(**DEFAULT_SIZES, **changes)
    torch.manual_seed(0)
    network = network_of(config)
    with torch.no_grad():
        for parameter in network.parameters():
            # With twice the spread, the residual stream of three layers could exceed 24 bits.
            parameter.normal_(0.0, 0.1)
        network.embedding.table.weight[0].zero_()
    return make_checkpoint(network.eval(), labels=LABELS)


def release(folder: Path, *, kernels: str = "float", **changes: object) -> Path:
    released = release_checkpoint(
        drawn_checkpoint(**changes),
        root=folder,
        name="machines",
        version="1",
        progress=lambda step: None,
        kernels=kernels,
    )
    return released.path


EXACT_BUNDLES = ["float kernels", "integer kernels"]
if BUNDLE_VARIABLE in os.environ:
    EXACT_BUNDLES.append(BUNDLE_VARIABLE)


@pytest.fixture(scope="session", params=EXACT_BUNDLES)
def exact_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose certificate proves that no machine can change a bit."""
    folder = tmp_path_factory.mktemp("bundles")
    if request.param == "float kernels":
        path = release(folder, arithmetic="exact")
    elif request.param == "integer kernels":
        # Products of 8-bit weights saturate on processors without VNNI.
        path = release(folder, arithmetic="exact", weight_bits=7, kernels="integer")
    else:
        path = Path(os.environ[BUNDLE_VARIABLE]).resolve()
    certificate = open_bundle(path).certificate
    assert certificate is not None
    assert certificate.is_exact, f"{path} is not proved to be the same on every machine"
    return path


@pytest.fixture(scope="session")
def saturating_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle with products of bytes that exceed 16 bits."""
    path = release(tmp_path_factory.mktemp("bundles"), arithmetic="exact", kernels="integer")
    certificate = open_bundle(path).certificate
    assert certificate is not None
    assert not certificate.is_exact
    return path


@pytest.fixture(scope="session")
def float32_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose sums are rounded, so that its bits depend on the machine."""
    return release(tmp_path_factory.mktemp("bundles"))
