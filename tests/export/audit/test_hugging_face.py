"""Networks that nobody wrote for the audit: attention passes its rate on, and one of them carries a
cache along.
"""

from __future__ import annotations

import pytest

from evalmode.bundle.certificate import Verdict
from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind
from tests.export.hugging_face import bert, gpt2, inputs


@pytest.mark.parametrize(("build", "sites"), [(bert, 5), (gpt2, 4)], ids=["bert", "gpt2"])
def test_every_site_of_a_hugging_face_network_is_inverted_dropout(
    build: object, sites: int
) -> None:
    found = audit(build(), inputs())  # type: ignore[operator]
    assert found.record.verdict is Verdict.PASS
    assert [site.kind for site in found.sites if site.kind is not Kind.NOT_CALLED] == [
        Kind.INVERTED
    ] * sites
