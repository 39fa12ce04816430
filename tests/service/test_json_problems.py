"""The errors about bodies that are not JSON: the mistake, its position and how to mend it."""

from __future__ import annotations

import json
import re

import pytest

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import parse_json

IS_NOT_JSON = "the body is not valid JSON: "


def sentence_about(raw: bytes) -> str:
    """The error about a body, without the beginning that all errors share."""
    with pytest.raises(BadRequest) as refusal:
        parse_json(raw, subject="the body")
    sentence = str(refusal.value)
    assert sentence.startswith(IS_NOT_JSON)
    return sentence.removeprefix(IS_NOT_JSON)


def is_json(text: str) -> bool:
    """Whether Python's parser reads the text."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            b'{"a":01}',
            "the number 01 begins with a zero"
            ", at character 6: remove the zero, or make it a string",
        ),
        (
            b"-01",
            "the number -01 begins with a zero"
            ", at character 1: remove the zero, or make it a string",
        ),
        (
            b'{"a":1.}',
            "the number 1. has no digit after its point"
            ", at character 6: write 0 there, or no point",
        ),
        (
            b"[1.e5]",
            "the number 1.e5 has no digit after its point"
            ", at character 2: write 0 there, or no point",
        ),
        (
            b'{"a":0x10}',
            "the number 0x10 is not decimal, at character 6: write it in decimal digits",
        ),
        (b"-0x1", "the number -0x1 is not decimal, at character 1: write it in decimal digits"),
        (b'{"a":+1}', "the number +1 begins with a plus sign, at character 6: remove the sign"),
        (b'{"a":.5}', "the number .5 has no digit before its point, at character 6: write 0 there"),
        (b"[-.5]", "the number -.5 has no digit before its point, at character 2: write 0 there"),
        (b'{"a":1_000}', "the number 1_000 has an underscore, at character 6: remove it"),
        (
            b'{"a":10L}',
            "the number 10L is not a JSON number"
            ", at character 6: write plain digits, or make it a string",
        ),
        (
            b'{"a":1e}',
            "the number 1e has no digits in its exponent"
            ", at character 6: write them, or no exponent",
        ),
        (
            b"[1e+]",
            "the number 1e+ has no digits in its exponent"
            ", at character 2: write them, or no exponent",
        ),
        (
            b'{"a": 2024-01-01}',
            "the number 2024-01-01 is not a JSON number"
            ", at character 7: write plain digits, or make it a string",
        ),
        (
            b'{"a":10%}',
            "the number 10% is not a JSON number"
            ", at character 6: write plain digits, or make it a string",
        ),
        (b'{"a":Infinity}', "Infinity is not a JSON number, at character 6: send a finite number"),
        (
            b'{"a":-Infinity}',
            "-Infinity is not a JSON number, at character 6: send a finite number",
        ),
        (
            b'{"a":"NaN", "b":NaN}',
            "NaN is not a JSON number, at character 17: send a finite number",
        ),
        (b'{"a":nan}', "the word nan is not JSON, at character 6: write a finite number"),
        (b'{"a":-inf}', "the word -inf is not JSON, at character 6: write a finite number"),
        (b'{"a":True}', "the word True is not JSON, at character 6: write true"),
        (b'{"a":None}', "the word None is not JSON, at character 6: write null"),
        (b'{"a":undefined}', "the word undefined is not JSON, at character 6: write null"),
        (
            b'{"a":nullx}',
            "the word nullx is not in quotes, at character 6: put it in double quotes",
        ),
        (b"{'a':1}", "a string is in single quotes, at character 2: use double quotes"),
        (b"{\"a\":'x'}", "a string is in single quotes, at character 6: use double quotes"),
        (b"[`a`]", "a string is in backticks, at character 2: use double quotes"),
        (
            '{"a":“x”}'.encode(),
            "a string is in typographic quotes, at character 6: use plain double quotes",
        ),
        (
            b'{\\"a\\":1}',
            "a backslash precedes the quote of a string, at character 2: remove the backslash",
        ),
        (
            b'{"a":1,}',
            "a comma precedes the end of an object, at character 7: remove the comma",
        ),
        (
            b'{"inputs": ["a" , ]\n}',
            "a comma precedes the end of a list, at character 17: remove the comma",
        ),
        (b"[1,,2]", "there is a comma instead of a value, at character 4: remove the comma"),
        (b"{,}", "there is a comma instead of a key, at character 2: remove the comma"),
        (
            b'{"a":1 /* x */}',
            "a comment is not allowed in JSON, at character 8: remove it",
        ),
        (b'{"a":1} // x', "a comment is not allowed in JSON, at character 9: remove it"),
        (b'# x\n{"a":1}', "a comment is not allowed in JSON, at character 1: remove it"),
        (b"[1 2]", "a comma is missing between two values, at character 4: write one here"),
        (b'{"a":1 "b":2}', "a comma is missing between two values, at character 8: write one here"),
        (
            b'{\n  "a": [\n    "a"\n    "b"\n  ]\n}',
            "a comma is missing between two values, at line 4, character 5: write one here",
        ),
        (b'{"a":1;"b":2}', "a semicolon separates two values, at character 7: use a comma"),
        (
            b'{"a":"he said "hi" to me"}',
            "a comma is missing after a string, or a quote in it is not escaped"
            ', at character 16: write a comma, or \\" in the string',
        ),
        (b'{"a":}', "a value is missing, at character 6: write one here"),
        (b'{"a"}', "a colon is missing after a key, at character 5: write a colon and a value"),
        (b'{"a"=1}', "an equals sign follows a key, at character 5: use a colon"),
        (b"{1:2}", "a key is a number, at character 2: put it in double quotes"),
        (b'{"a":1,5}', "a key is a number, at character 8: put it in double quotes"),
        (b'["a":1]', "a colon follows a value, at character 5: use a comma, or an object"),
        (b"[1}", "a list ends with }, at character 3: end it with ]"),
        (b'{"a":1]', "an object ends with ], at character 7: end it with }"),
        (b"[1]]", "a bracket ] closes nothing, at character 4: remove it"),
        (
            b'{"a":1}\n{"b":2}',
            "something follows the value, at line 2, character 1: send one value",
        ),
        (
            b"inputs=1",
            "the word inputs is not in quotes, at character 1: put it in double quotes",
        ),
        (b"<html></html>", "this is XML or HTML, at character 1: send JSON"),
        (
            b'{"a":(1,2)}',
            "a value is in round brackets, at character 6: use a list in square brackets",
        ),
        (b'{"a":@x}', "no value begins with @, at character 6: write a value here"),
        (b'["abc]', "a string has no end, at character 2: end it with a double quote"),
        (b'["a\tb"]', "a control character in a string is not escaped, at character 4: write \\t"),
        (
            b'["a\x00b"]',
            "a control character in a string is not escaped, at character 4: write \\u0000",
        ),
        (
            b'["C:\\Users"]',
            "a backslash does not begin an escape, at character 5: write \\\\ for a backslash",
        ),
        (
            b'["\\u12"]',
            "an escape \\u needs four hexadecimal digits"
            ", at character 4: write four, as in \\u00e9",
        ),
        (b"[1, 2", "it ends too early, at character 6: send all of it"),
        (b'{"a":tru', "it ends too early, at character 9: send all of it"),
        (
            b"\xef\xbb\xbf\xef\xbb\xbf{}",
            "a byte order mark is not allowed here, at character 1: remove it",
        ),
        (
            "[\ufeff1]".encode(),
            "a byte order mark is not allowed here, at character 2: remove it",
        ),
        (
            '{"a":\u00a01}'.encode(),
            "the character U+00A0 is outside of a string"
            ", at character 6: remove it, or use a plain space",
        ),
        (
            b'{"a":1}\0',
            "the character U+0000 is outside of a string"
            ", at character 8: remove it, or use a plain space",
        ),
        (b"[- 1]", "no digit follows the sign -, at character 2: write a number"),
        (
            "[1，2]".encode(),
            "this is a comma of another script, at character 3: use a plain comma",
        ),
    ],
)
def test_a_mistake_is_named_with_its_position_and_the_way_out(raw: bytes, sentence: str):
    assert sentence_about(raw) == sentence


@pytest.mark.parametrize("text", ['{"a":1}', '{"á":"ű"}', '"ű"', "17", "[1]"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_another_unicode_encoding_is_named_with_a_byte_order_mark_and_without(
    text: str, encoding: str
):
    name = encoding[:6].upper()
    sentence = f"it is {name} from its first byte on: send UTF-8"
    assert sentence_about(text.encode(encoding)) == sentence


def test_latin_1_is_refused_at_its_first_byte_that_is_not_utf_8():
    assert sentence_about('["é"]'.encode("latin-1")) == (
        "it is not UTF-8, the byte 0xe9 at position 2 does not begin a character: send UTF-8"
    )


def test_every_broken_body_has_a_sentence_of_the_same_form():
    """Each character of a body is removed, doubled, or preceded by another one."""
    body = '{"a": [1, -2.5e3, "b\\n", true, null, {}], "c": {"d": "é"}}'
    form = re.compile(r"[^:]+, at (line \d+, )?character \d+: [^:]+", re.DOTALL)
    broken = 0
    for index in range(len(body) + 1):
        variants = [
            body[:index],
            body[:index] + body[index + 1 :],
            body[: index + 1] + body[index:],
        ]
        variants += [
            body[:index] + character + body[index:] for character in "'`.+-x0,:;]}\\\n\0/#"
        ]
        for variant in variants:
            if variant and not is_json(variant):
                sentence = sentence_about(variant.encode())
                assert form.fullmatch(sentence), (variant, sentence)
                assert not re.search("Expecting|Extra data|delimiter", sentence)
                broken += 1
    assert broken > 500


def test_a_long_number_is_cut_and_named_from_its_first_digit():
    sentence = sentence_about(b"[1, " + b"9" * 3000 + b"x]")
    assert sentence.startswith(f"the number {'9' * 30}... is not a JSON number, at character 5:")


def test_a_constant_within_a_string_is_ignored():
    raw = rb'{"NaN": "NaN \"NaN\" \\", "b": -Infinity}'
    assert sentence_about(raw) == (
        "-Infinity is not a JSON number, at character 32: send a finite number"
    )
