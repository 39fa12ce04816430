"""The settings of a server: their sources in order, and one sentence about each wrong value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from evalmode.service import settings as module
from evalmode.service.cpu_quota import cpu_quota
from evalmode.service.errors import StartFailed
from evalmode.service.settings import GROUPS, SECRETS, Settings, load_settings, trace_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"EVALMODE_{name.upper()}", raising=False)
    monkeypatch.delenv("EVALMODE_CONFIG", raising=False)


def test_a_flag_overrides_the_environment_and_the_environment_overrides_the_default(monkeypatch):
    monkeypatch.setenv("EVALMODE_PORT", "9000")
    monkeypatch.setenv("EVALMODE_BUNDLE", "/srv/bundle")
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.bundle, settings.host) == (
        9001,
        Path("/srv/bundle"),
        "127.0.0.1",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "abc"),
        ("port", "70000"),
        ("threads", "0"),
        ("workers", "-1"),
        ("workers", "257"),
        ("workers", "autos"),
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
def test_a_wrong_value_is_one_sentence_that_names_the_setting_and_the_value(
    monkeypatch, field, value
):
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


@pytest.mark.parametrize(
    ("given", "workers"),
    [
        ({}, cpu_quota()),
        ({"workers": "auto"}, cpu_quota()),
        ({"provider": "CPUExecutionProvider"}, cpu_quota()),
        ({"threads": 2}, max(1, cpu_quota() // 2)),
        ({"threads": 4096}, 1),
        ({"provider": "cuda"}, 1),
        ({"provider": "cuda", "workers": "3"}, 3),
    ],
)
def test_auto_is_a_worker_for_each_core_that_the_threads_leave_and_one_beside_a_device(
    given, workers
):
    assert load_settings(**given).workers == workers


def test_a_wrong_number_of_workers_names_auto_and_wrong_threads_are_named_first():
    with pytest.raises(StartFailed, match="must be a whole number from 1 to 256, or auto, got 300"):
        load_settings(workers=300)
    with pytest.raises(StartFailed, match="setting threads"):
        load_settings(threads=0, workers="auto")


def test_settings_are_frozen():
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


@pytest.fixture
def config(tmp_path: Path):
    """A function that writes a settings file."""

    def write(content: str) -> Path:
        file = tmp_path / "evalmode.toml"
        file.write_text(content)
        return file

    return write


def test_the_environment_overrides_the_file_and_the_file_overrides_the_default(monkeypatch, config):
    file = config(
        'port = 9000\nhost = "::1"\nthreads = 2\ncors_origins = ["https://a", "https://b"]\n'
    )
    monkeypatch.setenv("EVALMODE_HOST", "0.0.0.0")
    settings, origins = trace_settings(config=file, port=9001, workers=None)
    assert (settings.port, settings.host, settings.threads) == (9001, "0.0.0.0", 2)
    assert settings.cors_origins == ("https://a", "https://b")
    names = ("port", "host", "threads", "workers")
    assert [origins[name] for name in names] == ["flag", "environment", "file", "default"]
    assert origins.keys() == Settings.model_fields.keys()


def test_the_environment_names_the_file_unless_a_flag_does(monkeypatch, config, tmp_path):
    monkeypatch.setenv("EVALMODE_CONFIG", str(config("port = 1\n")))
    assert load_settings().port == 1
    other = tmp_path / "other.toml"
    other.write_text("port = 2\n")
    assert load_settings(config=other).port == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prot = 1", "there is no setting prot; did you mean port?"),
        ("max-rows = 1", "there is no setting max-rows; did you mean max_rows?"),
        ("[tls]\nport = 1", "there is no setting tls; "),
        (
            "port = 'many'",
            "port must be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ("port = 70000", "port must be less than or equal to 65535, got 70000"),
        ("bundle = 3", "bundle must be a path, got 3"),
        ("cors_origins = [1]", "cors_origins must be a valid string, got 1"),
        ("port = 1\nport = 2", "is not valid TOML: "),
        ("port: 1", "is not valid TOML: "),
    ],
)
def test_an_error_in_the_file_is_one_sentence_with_the_file_the_key_and_the_value(
    config, content, problem
):
    file = config(content)
    with pytest.raises(StartFailed, match=re.escape(problem)) as failure:
        load_settings(config=file)
    assert str(file) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StartFailed, match="cannot be read: No such file"):
        load_settings(config=tmp_path / "absent.toml")


def test_a_wrong_secret_is_not_shown(config):
    with pytest.raises(StartFailed) as failure:
        load_settings(config=config("api_keys = 'x'\nssl_keyfile_password = 918273"))
    assert "ssl_keyfile_password" in str(failure.value)
    assert "918273" not in str(failure.value)


def test_the_secret_settings_are_the_keys_and_the_password():
    assert sorted(SECRETS) == ["api_keys", "ssl_keyfile_password"]


def test_lists_are_written_with_commas_in_the_environment(monkeypatch):
    monkeypatch.setenv("EVALMODE_CORS_ORIGINS", "https://a, https://b,")
    assert load_settings().cors_origins == ("https://a", "https://b")


def test_a_request_must_fit_into_the_queue():
    with pytest.raises(StartFailed, match="max_rows must be at most queue_rows, got 256 > 10"):
        load_settings(queue_rows=10)


def test_the_titles_of_the_groups_are_those_in_the_comments():
    source = Path(module.__file__).read_text()
    comments = re.findall(r"^    # (.*)\.\n    (\w+): ", source, flags=re.MULTILINE)
    assert [(first, name) for name, first in comments] == list(GROUPS.items())


@pytest.mark.parametrize("field", ["drain_s", "timeout_s", "header_timeout_s", "poll_s"])
def test_no_time_is_infinite(field):
    with pytest.raises(StartFailed, match=f"{field} .* must be a finite number, got inf"):
        load_settings(**{field: float("inf")})


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "http://", "/v1/traces"])
def test_the_endpoint_for_traces_must_be_an_http_address(endpoint):
    with pytest.raises(
        StartFailed,
        match=r"otlp_endpoint .* must be an address that begins with http:// or https://",
    ):
        load_settings(otlp_endpoint=endpoint)


def test_a_variable_that_is_no_setting_is_named_with_a_similar_setting(monkeypatch):
    for name in ("EVALMODE_API_KEY", "EVALMODE_PORT", "EVALMODE_CONFIG"):
        monkeypatch.setenv(name, "x")
    assert module.strange_variables() == {
        "EVALMODE_API_KEY": "there is no setting api_key; did you mean api_keys?",
    }
