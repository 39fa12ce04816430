"""What is wrong with a text that is no JSON, in words that name the mistake, its place and the way
out.

Python's parser only says what it expected. What stands there instead tells which mistake was made:
a number of another language, single quotes, a comment.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass

_SHOWN_CHARACTERS = 30
_LONGEST_TOKEN = 10_000

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

# What stands where a value, a key, a comma or a colon belongs.
_INTRUDERS = (
    ("\ufeff", "a byte order mark stands where JSON has none", "leave it out"),
    ("//|/\\*|#|<!--", "a comment stands here, and JSON has none", "leave it out"),
    ("'", "a string stands in single quotes", "use double quotes"),
    ("`", "a string stands in backticks", "use double quotes"),
    ("[“”„‟«»‹›‘’‚＂]", "a string stands in typographic quotes", "use plain double quotes"),
    ('\\\\"', "a backslash stands before the quote of a string", "leave the backslash out"),
    ("[;；]", "a semicolon stands between values", "use a comma"),
    ("[，、]", "a comma of another script stands here", "use a plain comma"),
    ("：", "a colon of another script stands here", "use a plain colon"),
    ("=>?", "an equals sign stands behind a key", "use a colon"),
    ("\\(", "a value stands in round brackets", "use a list in square brackets"),
    ("<", "this is XML or HTML", "send JSON"),
)
_WORDS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "none": "null",
    "nil": "null",
    "undefined": "null",
    "nan": "a finite number",
    "inf": "a finite number",
    "infinity": "a finite number",
}
_CUT_OFF = frozenset({"-", "t", "tr", "tru", "f", "fa", "fal", "fals", "n", "nu", "nul"})
_WORD = re.compile(r"[+-]?[^\W\d][\w$-]*")
# Dates and fractions too, which are often sent without quotes.
_NUMBER_CHARACTERS = re.compile(r"[+-]?\.?\d(?:[\w.%]|(?<=[eE])[+-]|[-/](?=\w))*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_STRING_OR_CONSTANT = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"|(?P<constant>-?Infinity|NaN)', re.DOTALL
)
_SHORT_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mistake, the way out, and the index of the character where it stands."""

    mistake: str
    way_out: str
    position: int

    def sentence(self, text: str, *, subject: str) -> str:
        """The sentence about `text`, which begins with `subject`."""
        line = text.count("\n", 0, self.position) + 1
        character = self.position - text.rfind("\n", 0, self.position)
        place = f"character {character}" if line == 1 else f"line {line}, character {character}"
        return f"{subject} is not valid JSON: {self.mistake}, at {place}: {self.way_out}"


def other_encoding(raw: bytes) -> str | None:
    """The name of the encoding where `raw` is UTF-16 or UTF-32, with or without a byte order
    mark.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return name
    # JSON begins and ends with an ASCII character, whose other bytes are zero there.
    for size, name in ((4, "UTF-32"), (2, "UTF-16")):
        for zeros in ([True] * (size - 1) + [False], [False] + [True] * (size - 1)):
            units = raw[:size], raw[-size:]
            if len(raw) % size == 0 and all(
                [byte == 0 for byte in unit] == zeros for unit in units
            ):
                return name
    return None


def constant_problem(text: str) -> Problem:
    """The problem with the first NaN, Infinity or -Infinity outside of strings, which Python reads
    and JSON does not have. The text is JSON as far as there.
    """
    constant = next(match for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])
    return Problem(
        mistake=f"{constant[0]} is not a JSON number",
        way_out="send a finite number",
        position=constant.start(),
    )


def problem_of(error: json.JSONDecodeError, text: str) -> Problem:
    """The problem at which Python's parser stopped."""
    position = error.pos
    if error.msg.startswith("Unterminated string"):
        return Problem(
            mistake="a string has no end", way_out="end it with a double quote", position=position
        )
    if error.msg.startswith("Invalid control character"):
        character = text[position]
        escape = _SHORT_ESCAPES.get(character, f"\\u{ord(character):04x}")
        return Problem(
            mistake="a control character in a string is not escaped",
            way_out=f"write {escape}",
            position=position,
        )
    if error.msg.startswith("Invalid \\u"):
        return Problem(
            mistake="an escape \\u has no four hexadecimal digits",
            way_out="write four, as in \\u00e9",
            position=position,
        )
    if error.msg.startswith("Invalid \\escape"):
        return Problem(
            mistake="a backslash begins no escape",
            way_out="write \\\\ for a backslash",
            position=position,
        )
    if error.msg.startswith("Illegal trailing comma"):  # since Python 3.13, at the comma
        position += 1 + len(text[position + 1 :]) - len(text[position + 1 :].lstrip())
    rest = text[position:].rstrip()
    if not rest or rest in _CUT_OFF:
        return Problem(
            mistake="it ends too early", way_out="send all of it", position=position + len(rest)
        )
    return (
        _number_problem(text, position)
        or _intruder(text, position)
        or _structure_problem(error.msg, text, position)
    )


def _number_problem(text: str, position: int) -> Problem | None:
    """The problem with the number that stands at `position`, or of which a part was read as a
    number.
    """
    start = _start_of_token(text, position)
    match = _NUMBER_CHARACTERS.match(text, start)
    if match is None or match.end() <= position or _NUMBER.fullmatch(match[0]):
        return None
    number = match[0]
    digits = number.lstrip("+-")
    whole, _, fraction = digits.partition(".")
    if number.startswith("+"):
        mistake, way_out = "begins with a plus sign", "leave the sign out"
    elif digits.startswith("."):
        mistake, way_out = "has no digit before its point", "write 0 there"
    elif re.fullmatch(r"0[xXoObB]\w+", digits):
        mistake, way_out = "is not decimal", "write it in decimal digits"
    elif re.fullmatch(r"0\d+", whole):
        mistake, way_out = "begins with a zero", "leave that out, or make it a string"
    elif "." in digits and not fraction[:1].isdigit():
        mistake, way_out = "has no digit behind its point", "write 0 there, or no point"
    elif "_" in digits:
        mistake, way_out = "has an underscore", "leave it out"
    elif re.fullmatch(r"[\d.]+[eE][+-]?", digits):
        mistake, way_out = "has no digits in its exponent", "write them, or no exponent"
    else:
        mistake, way_out = "is not a JSON number", "write plain digits, or make it a string"
    return Problem(mistake=f"the number {_cut(number)} {mistake}", way_out=way_out, position=start)


def _start_of_token(text: str, position: int) -> int:
    """Where the number or the word begins that goes on at `position`."""
    start = position
    while start > max(0, position - _LONGEST_TOKEN):
        character = text[start - 1]
        if not (character.isalnum() or character in "+-._"):
            break
        start -= 1
    return start


def _intruder(text: str, position: int) -> Problem | None:
    """The problem with what stands at `position`, where JSON would have it nowhere."""
    for pattern, mistake, way_out in _INTRUDERS:
        if re.match(pattern, text[position : position + 4]):
            return Problem(mistake=mistake, way_out=way_out, position=position)
    character = text[position]
    if character.isspace() or not character.isprintable():
        return Problem(
            mistake=f"the character U+{ord(character):04X} stands outside of a string",
            way_out="leave it out, or use a plain space",
            position=position,
        )
    return None


def _structure_problem(message: str, text: str, position: int) -> Problem:
    """The problem with a value, a key, a comma or a colon that is missing or too many."""
    character = text[position]
    before = text[:position].rstrip()[-1:]
    start = _start_of_token(text, position)
    word = _WORD.match(text, start)
    if before == "," and character in "]}":
        holder = "a list" if character == "]" else "an object"
        return Problem(
            mistake=f"a comma stands before the end of {holder}",
            way_out="leave the comma out",
            position=text.rindex(",", 0, position),
        )
    meant = _WORDS.get(word[0].lstrip("+-").lower()) if word else None
    if word and meant and meant != word[0] and not message.startswith("Expecting property name"):
        return Problem(
            mistake=f"the word {word[0]} is not JSON", way_out=f"write {meant}", position=start
        )
    if word and start < position < word.end():
        return Problem(
            mistake=f"the word {_cut(word[0])} stands in no quotes",
            way_out="put it in double quotes",
            position=start,
        )
    if message.startswith("Extra data"):
        mistake, way_out = "something follows behind the value", "send one value"
        if character in "]}":
            mistake, way_out = f"a bracket {character} closes nothing", "leave it out"
    elif message.startswith("Expecting property name"):
        mistake, way_out = "a key in double quotes is missing", "write one before each colon"
        if word:
            mistake = f"the key {_cut(word[0])} stands in no quotes"
            way_out = "put it in double quotes"
        elif character == ",":
            mistake, way_out = "a comma stands where a key belongs", "leave the comma out"
        elif character in "0123456789-":
            mistake, way_out = "a key is a number", "put it in double quotes"
    elif message.startswith("Expecting ':'"):
        mistake, way_out = "a colon is missing behind a key", "write a colon and a value"
    elif message.startswith("Expecting ','"):
        mistake, way_out = "a comma is missing between two values", "write one here"
        if character == "}":
            mistake, way_out = "a list ends with }", "end it with ]"
        elif character == "]":
            mistake, way_out = "an object ends with ]", "end it with }"
        elif character == ":":
            mistake, way_out = "a colon stands behind a value", "use a comma, or an object"
        elif before == '"' and word:
            mistake = "a comma is missing behind a string, or a quote in it is not escaped"
            way_out = 'write a comma, or \\" in the string'
    else:
        mistake, way_out = "a value is missing", "write one here"
        if word:
            mistake = f"the word {_cut(word[0])} stands in no quotes"
            way_out = "put it in double quotes"
        elif character in "-+":
            mistake, way_out = f"the sign {character} stands before no digit", "write a number"
        elif character == ",":
            mistake, way_out = "a comma stands where a value belongs", "leave the comma out"
        elif character not in "]}:":
            mistake, way_out = f"no value begins with {character}", "write a value here"
    return Problem(mistake=mistake, way_out=way_out, position=position)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
