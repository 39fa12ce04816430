from __future__ import annotations

import asyncio
import gzip
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterable

import pytest

from evalmode.service.errors import BadRequest, BodyTooLarge, UnsupportedMedia
from evalmode.service.http.body import read_body
from evalmode.service.protocol.compression import (
    Encoding,
    accepted_encoding,
    compress,
    declared_encoding,
    decompress,
)

TEXT = b"Ez egy rovid mondat. " * 10_000


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


def read(chunks: Iterable[bytes], encoding: Encoding, *, max_body_bytes: int = 10**6) -> bytes:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return asyncio.run(
        read_body(
            decompress(stream(), encoding),
            declared_bytes=None,
            max_body_bytes=max_body_bytes,
            silence_s=30,
        )
    )


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


@pytest.mark.parametrize(
    ("packed", "encoding"),
    [
        (gzip.compress(TEXT, mtime=0), "gzip"),  # a time stamp would change the test's name
        (zlib.compress(TEXT), "deflate"),
        (raw_deflate(TEXT), "deflate"),
    ],
)
def test_a_body_is_decompressed_from_chunks_of_any_size(packed: bytes, encoding: Encoding):
    for size in (1, 7, len(packed)):
        assert read(cut(packed, size), encoding) == TEXT
    assert read([b"", *cut(packed, 100), b""], encoding) == TEXT


def test_a_bomb_of_a_gigabyte_stops_at_the_limit_and_takes_no_memory():
    sent_bytes = 0

    def bomb() -> Iterable[bytes]:
        nonlocal sent_bytes
        compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
        for _ in range(1024):
            if chunk := compressor.compress(bytes(1 << 20)):
                sent_bytes += len(chunk)
                yield chunk
        yield compressor.flush()

    tracemalloc.start()
    with pytest.raises(BodyTooLarge, match="larger than the 1000000 bytes"):
        read(bomb(), "gzip")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20
    assert sent_bytes < 200_000


def test_a_bomb_in_one_chunk_stops_at_the_limit_too():
    packed = zlib.compress(bytes(1 << 26), 9)
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        read([packed], "deflate")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize(
    ("chunks", "encoding", "sentence"),
    [
        ([], "gzip", "ends within its gzip data"),
        ([b"\x1f"], "gzip", "ends within its gzip data"),
        ([b"no gzip at all"], "gzip", "is not gzip data"),
        ([b"\xff\xff\xff"], "deflate", "is not deflate data"),
        ([gzip.compress(TEXT)[:-1]], "gzip", "ends within its gzip data"),
        ([gzip.compress(TEXT)[:-5] + b"xxxxx"], "gzip", "is not gzip data"),
        ([gzip.compress(b"a") + b"b"], "gzip", "goes on after the end"),
        ([zlib.compress(b"a"), b"b"], "deflate", "goes on after the end"),
        ([zlib.compress(b"a") * 2], "deflate", "goes on after the end"),
        ([gzip.compress(b"a") + b"\0" * 512], "gzip", "goes on after the end"),
        ([gzip.compress(b"a"), b"\x1f\x8c"], "gzip", "goes on after the end"),
        ([gzip.compress(b"a"), b"\x1f"], "gzip", "ends within its gzip data"),
        ([gzip.compress(b"a"), b"\x1f\x8b"], "gzip", "ends within its gzip data"),
        ([gzip.compress(b"a"), gzip.compress(b"b")[:-1]], "gzip", "ends within its gzip data"),
        ([gzip.compress(b"a"), b"\x1f\x8b" + bytes(20)], "gzip", "is not gzip data"),
    ],
)
def test_data_in_another_format_is_refused(chunks: list[bytes], encoding: Encoding, sentence: str):
    with pytest.raises(BadRequest, match=sentence):
        read(chunks, encoding)


def test_several_gzip_members_are_read_as_their_texts_in_order():
    members = [b"", TEXT, b"a", b"", bytes(100_000)]
    packed = b"".join(gzip.compress(member, mtime=0) for member in members)
    for size in (1, 7, 1000, len(packed)):
        assert read(cut(packed, size), "gzip") == b"".join(members)


def test_a_bomb_of_many_members_stops_at_the_limit():
    member = gzip.compress(bytes(1 << 20), mtime=0)
    sent_members = 0

    def bomb() -> Iterable[bytes]:
        nonlocal sent_members
        for _ in range(1024):
            sent_members += 1
            yield member

    with pytest.raises(BodyTooLarge, match="larger than the 1000000 bytes"):
        read(bomb(), "gzip")
    assert sent_members == 1
    assert read([gzip.compress(bytes(1000), mtime=0) * 1000], "gzip") == bytes(1_000_000)
    with pytest.raises(BodyTooLarge):
        read([gzip.compress(bytes(1000), mtime=0) * 1001], "gzip")


def test_empty_members_in_one_chunk_are_copied_a_few_times_at_most():
    """50,000 members are 1 MB. With a copy for each member they would be 25 GB."""
    packed = gzip.compress(b"", mtime=0) * 50_000
    started = time.process_time()
    assert read([packed], "gzip") == b""
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("headers", "encoding"),
    [
        ([], None),
        ([""], None),
        (["identity"], None),
        (["GZIP"], "gzip"),
        (["x-gzip"], "gzip"),
        ([" deflate "], "deflate"),
        (["identity, gzip"], "gzip"),
        (["identity", "gzip"], "gzip"),
    ],
)
def test_the_headers_of_a_request_name_its_encoding(headers: list[str], encoding: str | None):
    assert declared_encoding(headers) == encoding


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        (["br"], 'must be gzip, deflate or identity, got "br"'),
        (["gzip, br"], 'must be gzip, deflate or identity, got "br"'),
        (["x" * 1000], "must be gzip, deflate or identity"),
        (["gzip, gzip"], 'must name one encoding, got "gzip, gzip"'),
        (["gzip", "deflate"], 'must name one encoding, got "gzip, deflate"'),
    ],
)
def test_another_encoding_and_several_are_refused(headers: list[str], sentence: str):
    with pytest.raises(UnsupportedMedia) as refusal:
        declared_encoding(headers)
    assert str(refusal.value).startswith("header content-encoding ")
    assert sentence in str(refusal.value)
    assert len(str(refusal.value)) < 200
    assert refusal.value.field == "content-encoding"


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("*", None),
        ("br", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate;q=1.0, gzip; q=0.5", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=x", None),
        ("gzip;q=nan", None),
    ],
)
def test_the_response_has_the_encoding_that_the_client_prefers(
    header: str | None, encoding: str | None
):
    assert accepted_encoding(header) == encoding


def test_equal_responses_are_compressed_to_equal_bytes():
    assert compress(TEXT, "gzip")[4:8] == b"\0\0\0\0"  # the time stamp
    assert gzip.decompress(compress(TEXT, "gzip")) == TEXT
    assert zlib.decompress(compress(TEXT, "deflate")) == TEXT
