from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from evalmode.service.errors import StartFailed
from evalmode.service.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"EVALMODE_{name.upper()}", raising=False)


def test_a_flag_goes_before_the_environment_and_the_environment_before_the_default(monkeypatch):
    monkeypatch.setenv("EVALMODE_PORT", "9000")
    monkeypatch.setenv("EVALMODE_BUNDLE", "/srv/bundle")
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.bundle, settings.host) == (9001, Path("/srv/bundle"), "127.0.0.1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "abc"),
        ("port", "70000"),
        ("threads", "0"),
        ("workers", "-1"),
        ("max_body_bytes", "0"),
        ("max_rows", "none"),
        ("max_top_k", "1.5"),
        ("grace_s", "0"),
        ("allow_uncertified", "perhaps"),
        ("log_format", "xml"),
        ("provider", ""),
        ("host", ""),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_setting_and_the_value(monkeypatch, field, value):
    monkeypatch.setenv(f"EVALMODE_{field.upper()}", value)
    with pytest.raises(StartFailed) as failure:
        load_settings()
    sentence = str(failure.value)
    assert f"EVALMODE_{field.upper()}" in sentence
    assert repr(value) in sentence
    assert "\n" not in sentence


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(StartFailed, match="max_row"):
        load_settings(max_row=3)


def test_settings_do_not_change_once_built():
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
