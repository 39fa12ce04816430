"""/v1 of a real server: compressed bodies, and queries with both forms of a body."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import pytest

from tests.service.processes import RunningServer

TEXT = "Dit is een zin."
BODY = json.dumps({"inputs": [TEXT]}).encode()
LINES = json.dumps(TEXT).encode() + b"\n"
NDJSON = {"content-type": "application/x-ndjson"}


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


def predict(
    service: RunningServer, content: Any, query: str = "", **headers: str
) -> httpx.Response:
    sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{service.url}/v1/predict{query}", content=content, headers=sent_headers)


def refusal(answer: httpx.Response, status: int) -> tuple[str, str | None]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "field"}
    return body["error"], body["field"]


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


COMPRESSED = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("identity", bytes),
]


@pytest.mark.parametrize(("encoding", "compress"), COMPRESSED)
def test_a_compressed_body_gets_the_response_of_the_plain_one(service, encoding, compress):
    plain = predict(service, BODY)
    assert plain.status_code == 200
    compressed = predict(service, compress(BODY), content_encoding=encoding)
    assert compressed.content == plain.content


@pytest.mark.parametrize(("encoding", "compress"), COMPRESSED)
def test_compressed_lines_get_the_answers_of_the_plain_ones(service, encoding, compress):
    headers = {"content_type": "application/x-ndjson"}
    lines = LINES * 3000
    plain = predict(service, lines, **headers)
    assert len(lines_of(plain)) == 3000
    compressed = predict(service, compress(lines), content_encoding=encoding, **headers)
    assert compressed.content == plain.content


@pytest.mark.parametrize("media", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip, br"])
def test_another_encoding_is_refused_with_the_name_of_its_header(service, media, encoding):
    for content in (BODY, LINES):
        answer = predict(service, content, content_type=media, content_encoding=encoding)
        sentence, field = refusal(answer, 415)
        assert sentence.startswith("header content-encoding must ")
        assert field == "content-encoding"
        assert answer.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(BODY)[:-4], "the body ends within its gzip data"),
        (gzip.compress(BODY) + b"x", "the body goes on after the end of its gzip data"),
        (BODY, "the body is not gzip data as its header content-encoding says"),
        (b"", "the body ends within its gzip data"),
    ],
    ids=["cut", "more behind it", "plain", "empty"],
)
def test_a_body_in_another_format_than_its_encoding_is_refused(service, content, sentence):
    assert refusal(predict(service, content, content_encoding="gzip"), 400)[0] == sentence


def test_a_gzip_body_of_several_members_is_answered_as_one(service):
    body = gzip.compress(BODY[:7]) + gzip.compress(BODY[7:])
    assert predict(service, body, content_encoding="gzip").json() == predict(service, BODY).json()
    lines = gzip.compress(LINES[:9]) + gzip.compress(LINES[9:] + LINES)
    answers = lines_of(predict(service, lines, content_encoding="gzip", **NDJSON_ARGUMENT))
    assert answers == lines_of(predict(service, LINES * 2, **NDJSON_ARGUMENT))


def test_the_limit_holds_after_decompression_and_the_refusal_names_its_setting(service):
    limit_bytes = 65_536
    fits = b" " * (limit_bytes - len(BODY)) + BODY
    assert predict(service, gzip.compress(fits), content_encoding="gzip").status_code == 200
    for content, encoding in (
        (gzip.compress(b" " + fits), "gzip"),
        (gzip.compress(bytes(50_000_000)), "gzip"),
        (b" " + fits, "identity"),
    ):
        sentence, _ = refusal(predict(service, content, content_encoding=encoding), 413)
        assert f"larger than the {limit_bytes} bytes" in sentence
        assert "max_body_bytes (--max-body-bytes, EVALMODE_MAX_BODY_BYTES)" in sentence


def test_a_compressed_line_over_the_limit_is_a_problem_of_that_line(service):
    lines = LINES + b'"' + b"x" * 1_000_000 + b'"\n' + LINES
    answer = predict(service, gzip.compress(lines), content_encoding="gzip", **NDJSON_ARGUMENT)
    first, second, third = lines_of(answer)
    assert first["top"] == third["top"]
    assert "longer than the 65536 bytes" in second["error"]
    assert "EVALMODE_MAX_BODY_BYTES" in second["error"]


def test_broken_compression_of_a_few_lines_is_refused_with_a_status(service):
    content = gzip.compress(LINES * 3)[:-4]
    answer = predict(service, content, content_encoding="gzip", **NDJSON_ARGUMENT)
    assert refusal(answer, 400)[0] == "the body ends within its gzip data"


def test_broken_compression_after_many_lines_becomes_the_last_line(service):
    content = gzip.compress(LINES * 5000)[:-4]
    *answers, last = lines_of(predict(service, content, content_encoding="gzip", **NDJSON_ARGUMENT))
    assert len(answers) == 5000
    assert last == {"error": "the body ends within its gzip data"}


# The same header, as an argument of `predict`.
NDJSON_ARGUMENT = {"content_type": NDJSON["content-type"]}


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("?model=nosuch&top_k=1", 404, None),
        ("?version=1", 422, "version"),
        ("?model=tiny&version=9", 404, None),
        ("?top_k=0", 422, "top_k"),
        ("?truncate=perhaps", 422, "truncate"),
        ("?topk=1", 422, "topk"),
        ("?top_k=1&top_k=2", 422, "top_k"),
    ],
)
def test_a_query_is_refused_with_json_as_it_is_with_lines(service, query, status, field):
    by_json = refusal(predict(service, BODY, query, content_type="application/json"), status)
    by_lines = refusal(predict(service, LINES, query, **NDJSON_ARGUMENT), status)
    assert by_json == by_lines
    assert by_json[1] == field


def test_a_query_has_the_same_effect_with_json_and_with_lines(service):
    query = "?model=tiny&version=1&top_k=1&truncate=true"
    (by_json,) = predict(service, BODY, query).json()["predictions"]
    (by_lines,) = lines_of(predict(service, LINES, query, **NDJSON_ARGUMENT))
    assert by_json["top"] == by_lines["top"]
    assert len(by_json["top"]) == 1


def test_truncate_in_the_query_applies_to_json_and_to_lines(service):
    long = "x" * 500
    answer = predict(service, json.dumps({"inputs": [long]}), "?truncate=false")
    assert refusal(answer, 422)[1] == "inputs.0"
    (line,) = lines_of(predict(service, json.dumps(long), "?truncate=false", **NDJSON_ARGUMENT))
    assert "longer than" in line["error"]


def test_a_field_in_query_and_body_is_refused(service):
    body = json.dumps({"inputs": [TEXT], "top_k": 1})
    sentence, field = refusal(predict(service, body, "?top_k=1"), 422)
    assert sentence == "top_k is in the query and in the body: send it in one of them"
    assert field == "top_k"


@pytest.mark.parametrize("key", ["top_k", "model", "label", ""])
def test_a_line_with_another_field_than_text_and_id_is_refused(service, key):
    content = json.dumps({"text": TEXT, "id": 7, key: 1}) + "\n" + LINES.decode()
    problem, answer = lines_of(predict(service, content, **NDJSON_ARGUMENT))
    name = key or '""'
    assert problem["error"].startswith(f"{name} is not a field of a line, which has text and id")
    assert problem["id"] == 7
    assert answer["index"] == 1


def test_a_byte_order_mark_is_ignored_in_json_and_in_lines(service):
    mark = b"\xef\xbb\xbf"
    assert predict(service, mark + BODY).content == predict(service, BODY).content
    assert (
        predict(service, mark + LINES, **NDJSON_ARGUMENT).content
        == predict(service, LINES, **NDJSON_ARGUMENT).content
    )


@pytest.mark.parametrize("timeout", ["0000000000005000", "5000", "9" * 5000])
def test_a_timeout_may_have_any_number_of_digits(service, timeout):
    assert predict(service, BODY, x_request_timeout_ms=timeout).status_code == 200


@pytest.mark.parametrize("timeout", ["0", "000", "-5", "5.0", "5e3", "x" * 5000, ""])
def test_a_timeout_that_is_not_a_number_is_refused_and_shortened(service, timeout):
    sentence, field = refusal(predict(service, BODY, x_request_timeout_ms=timeout), 400)
    assert sentence.startswith("header x-request-timeout-ms must be a whole number of milliseconds")
    assert field == "x-request-timeout-ms"
    assert len(sentence) < 200


@pytest.mark.parametrize(
    ("query", "field"), [("?nmae=tiny", "nmae"), ("?model=tiny&model=tiny", "model")]
)
def test_an_unknown_or_repeated_parameter_of_the_model_route_is_refused(service, query, field):
    assert refusal(httpx.get(f"{service.url}/v1/model{query}"), 422)[1] == field


WORDS_OF_PYTHON = (
    "codec",
    "utf-8-sig",
    "Expecting",
    "delimiter",
    "Exceeds the limit",
    "sys.",
    "Traceback",
    "object is not",
    "invalid literal",
    "Input should",
    "User callback",
)


@pytest.mark.parametrize(
    "content",
    [
        b'{"inputs":["a"],"top_k":%s}' % (b"9" * 5000),
        b'{"inputs":["a"],"top_k":%s}' % (b"9" * 4000),
        b'{"inputs":["a"],"top_k":1%s}' % (b"0" * 4000),
        b'{"inputs":["a"],"top_k":1e999}',
        b'{"inputs":["a"],"top_k":[%s]}' % (b"9" * 4000),
        b'{"inputs":["a"],"":7}',
        b'{"inputs":["a"],"%s":7}' % (b"x" * 5000),
        b'{"inputs":["a"],"\\ud83d":7}',
        b'{"inputs":["a"],"model":"\\ud83d"}',
        b'{"inputs":["a"],"model":"%s"}' % (b"x" * 5000),
        b'{"inputs":["a"],"model":7}',
        b'{"inputs":["a"],"truncate":"yes"}',
        b'{"inputs":{"a":1}}',
        b'{"inputs":[%s]}' % (b"9" * 4000),
        b'{"inputs":%s}' % (b"[" * 900 + b"]" * 900),
        b"[" * 5000,
        b"\x8b\x1f",
        b'{"inputs":["\xff"]}',
        "{}".encode("utf-16"),
        b"",
        b"{",
        b"{,}",
        b'{"inputs":["a"]} x',
        b'{"inputs":["a",]}',
        b"{'inputs':['a']}",
        b'{"inputs":["a\n"]}',
        b'{"inputs":["\\x"]}',
        b'{"inputs":[NaN]}',
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_malformed_body_is_refused_with_a_short_sentence_of_ours(service, content):
    answers = [predict(service, content)]
    path = f"{service.url}/v2/models/tiny/infer"
    answers.append(httpx.post(path, content=content))
    answers.append(predict(service, content.replace(b"\n", b" ") + b"\n", **NDJSON_ARGUMENT))
    assert answers[0].status_code in (400, 404, 422)
    assert answers[1].status_code == 400
    for answer in answers:
        sentences = [json.loads(line)["error"] for line in answer.text.splitlines()]
        for sentence in sentences:
            assert len(sentence) < 300
            assert not [word for word in WORDS_OF_PYTHON if word in sentence], sentence
