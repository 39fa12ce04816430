"""What is wrong with a text that is not JSON: the mistake, where it is, and the way out.

Python's parser only says what it expected. The text at that place shows which mistake was made: a
number of another language, single quotes, a comment. `problem_of` has the order of the decisions.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass

_SHOWN_CHARACTERS = 30
# How many characters back the beginning of a number or a word is looked for: a body may be one long
# word.
_LONGEST_TOKEN = 10_000

# UTF-32 first, because its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

# Syntax of other languages: a pattern, the mistake, and the way out.
_FOREIGN_SYNTAX = (
    ("\ufeff", "a byte order mark is not allowed here", "remove it"),
    ("//|/\\*|#|<!--", "a comment is not allowed in JSON", "remove it"),
    ("'", "a string is in single quotes", "use double quotes"),
    ("`", "a string is in backticks", "use double quotes"),
    ("[“”„‟«»‹›‘’‚＂]", "a string is in typographic quotes", "use plain double quotes"),
    ('\\\\"', "a backslash precedes the quote of a string", "remove the backslash"),
    ("[;；]", "a semicolon separates two values", "use a comma"),
    ("[，、]", "this is a comma of another script", "use a plain comma"),
    ("：", "this is a colon of another script", "use a plain colon"),
    ("=>?", "an equals sign follows a key", "use a colon"),
    ("\\(", "a value is in round brackets", "use a list in square brackets"),
    ("<", "this is XML or HTML", "send JSON"),
)
# Words of other languages, in lower case, and what JSON has instead.
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
# The beginnings of words, as the last characters of a text that was cut off.
_CUT_OFF = frozenset({"-", "t", "tr", "tru", "f", "fa", "fal", "fals", "n", "nu", "nul"})
_WORD = re.compile(r"[+-]?[^\W\d][\w$-]*")
# What begins like a number: dates and fractions too, which are often sent without quotes.
_NUMBER_CHARACTERS = re.compile(r"[+-]?\.?\d(?:[\w.%]|(?<=[eE])[+-]|[-/](?=\w))*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_STRING_OR_CONSTANT = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"|(?P<constant>-?Infinity|NaN)', re.DOTALL
)
_SHORT_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mistake, the way out, and the index of its first character in the text."""

    mistake: str
    way_out: str
    position: int

    def sentence(self, text: str, *, subject: str) -> str:
        """The problem with `text` as one sentence that begins with `subject`.

        >>> problem = Problem(mistake="a value is missing", way_out="write one here", position=5)
        >>> problem.sentence('{"a":}', subject="the body")
        'the body is not valid JSON: a value is missing, at character 6: write one here'
        """
        line = text.count("\n", 0, self.position) + 1
        character = self.position - text.rfind("\n", 0, self.position)
        location = f"character {character}"
        if line > 1:
            location = f"line {line}, {location}"
        return f"{subject} is not valid JSON: {self.mistake}, at {location}: {self.way_out}"


def other_encoding(raw: bytes) -> str | None:
    """The name "UTF-16" or "UTF-32" if `raw` is in that encoding, else None.

    With or without a byte order mark.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return name
    # Without a mark: JSON begins and ends with an ASCII character. In these encodings its unit has
    # one byte that is not zero, the first (little-endian) or the last (big-endian).
    for size, name in ((4, "UTF-32"), (2, "UTF-16")):
        if len(raw) % size:
            continue
        for ascii_index in (0, size - 1):
            expected = [index != ascii_index for index in range(size)]
            first_zeros = [byte == 0 for byte in raw[:size]]
            last_zeros = [byte == 0 for byte in raw[-size:]]
            if first_zeros == last_zeros == expected:
                return name
    return None


def constant_problem(text: str) -> Problem:
    """The problem with the first NaN, Infinity or -Infinity outside of strings.

    Python's parser reads these, and JSON does not have them. The text before must be JSON.
    """
    constant = next(match for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])
    return Problem(
        mistake=f"{constant[0]} is not a JSON number",
        way_out="send a finite number",
        position=constant.start(),
    )


def problem_of(error: json.JSONDecodeError, text: str) -> Problem:
    """The problem at which Python's parser stopped, with this error.

    The decisions, in order:

    1. The mistake is inside a string: no end, a control character, a wrong escape.
    2. The text ends too early.
    3. A number is not as JSON writes it.
    4. The syntax is that of another language: quotes, comments, brackets, blanks.
    5. A value, a key, a comma or a colon is missing, or there is one too many.
    """
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
            mistake="an escape \\u needs four hexadecimal digits",
            way_out="write four, as in \\u00e9",
            position=position,
        )
    if error.msg.startswith("Invalid \\escape"):
        return Problem(
            mistake="a backslash does not begin an escape",
            way_out="write \\\\ for a backslash",
            position=position,
        )
    # Python 3.13 reports a trailing comma at the comma, earlier versions after it and its blanks.
    if error.msg.startswith("Illegal trailing comma"):
        rest = text[position + 1 :]
        position += 1 + len(rest) - len(rest.lstrip())
    rest = text[position:].rstrip()
    if not rest or rest in _CUT_OFF:
        return Problem(
            mistake="it ends too early", way_out="send all of it", position=position + len(rest)
        )
    return (
        _number_problem(text, position)
        or _foreign_syntax_problem(text, position)
        or _structure_problem(error.msg, text, position)
    )


def _number_problem(text: str, position: int) -> Problem | None:
    """The problem with the number at `position`. The parser may have read its beginning."""
    start = _start_of_token(text, position)
    match = _NUMBER_CHARACTERS.match(text, start)
    if match is None or match.end() <= position or _NUMBER.fullmatch(match[0]):
        return None
    number = match[0]
    digits = number.lstrip("+-")
    whole, _, fraction = digits.partition(".")
    if number.startswith("+"):
        mistake, way_out = "begins with a plus sign", "remove the sign"
    elif digits.startswith("."):
        mistake, way_out = "has no digit before its point", "write 0 there"
    elif re.fullmatch(r"0[xXoObB]\w+", digits):
        mistake, way_out = "is not decimal", "write it in decimal digits"
    elif re.fullmatch(r"0\d+", whole):
        mistake, way_out = "begins with a zero", "remove the zero, or make it a string"
    elif "." in digits and not fraction[:1].isdigit():
        mistake, way_out = "has no digit after its point", "write 0 there, or no point"
    elif "_" in digits:
        mistake, way_out = "has an underscore", "remove it"
    elif re.fullmatch(r"[\d.]+[eE][+-]?", digits):
        mistake, way_out = "has no digits in its exponent", "write them, or no exponent"
    else:
        mistake, way_out = "is not a JSON number", "write plain digits, or make it a string"
    return Problem(
        mistake=f"the number {_excerpt(number)} {mistake}", way_out=way_out, position=start
    )


def _start_of_token(text: str, position: int) -> int:
    """The index of the first character of the number or the word around `position`."""
    start = position
    while start > max(0, position - _LONGEST_TOKEN):
        character = text[start - 1]
        if not (character.isalnum() or character in "+-._"):
            break
        start -= 1
    return start


def _foreign_syntax_problem(text: str, position: int) -> Problem | None:
    """The problem with characters at `position` that JSON has only inside strings."""
    for pattern, mistake, way_out in _FOREIGN_SYNTAX:
        if re.match(pattern, text[position : position + 4]):
            return Problem(mistake=mistake, way_out=way_out, position=position)
    character = text[position]
    if character.isspace() or not character.isprintable():
        return Problem(
            mistake=f"the character U+{ord(character):04X} is outside of a string",
            way_out="remove it, or use a plain space",
            position=position,
        )
    return None


def _structure_problem(message: str, text: str, position: int) -> Problem:
    """The problem with a value, a key, a comma or a colon that is missing or superfluous.

    `message` is that of Python's parser.
    """
    character = text[position]
    previous = text[:position].rstrip()[-1:]
    start = _start_of_token(text, position)
    word = _WORD.match(text, start)
    if previous == "," and character in "]}":
        container = "a list" if character == "]" else "an object"
        return Problem(
            mistake=f"a comma precedes the end of {container}",
            way_out="remove the comma",
            position=text.rindex(",", 0, position),
        )
    # A key may be any word, so only values are looked up.
    if word and not message.startswith("Expecting property name"):
        json_word = _WORDS.get(word[0].lstrip("+-").lower())
        if json_word is not None and json_word != word[0]:
            return Problem(
                mistake=f"the word {word[0]} is not JSON",
                way_out=f"write {json_word}",
                position=start,
            )
    # The parser has read the beginning of a word, such as "null" of "nullx".
    if word and start < position < word.end():
        return Problem(
            mistake=f"the word {_excerpt(word[0])} is not in quotes",
            way_out="put it in double quotes",
            position=start,
        )
    if message.startswith("Extra data"):
        mistake, way_out = "something follows the value", "send one value"
        if character in "]}":
            mistake, way_out = f"a bracket {character} closes nothing", "remove it"
    elif message.startswith("Expecting property name"):
        mistake, way_out = "a key in double quotes is missing", "write one before each colon"
        if word:
            mistake = f"the key {_excerpt(word[0])} is not in quotes"
            way_out = "put it in double quotes"
        elif character == ",":
            mistake, way_out = "there is a comma instead of a key", "remove the comma"
        elif character in "0123456789-":
            mistake, way_out = "a key is a number", "put it in double quotes"
    elif message.startswith("Expecting ':'"):
        mistake, way_out = "a colon is missing after a key", "write a colon and a value"
    elif message.startswith("Expecting ','"):
        mistake, way_out = "a comma is missing between two values", "write one here"
        if character == "}":
            mistake, way_out = "a list ends with }", "end it with ]"
        elif character == "]":
            mistake, way_out = "an object ends with ]", "end it with }"
        elif character == ":":
            mistake, way_out = "a colon follows a value", "use a comma, or an object"
        elif previous == '"' and word:
            mistake = "a comma is missing after a string, or a quote in it is not escaped"
            way_out = 'write a comma, or \\" in the string'
    else:
        mistake, way_out = "a value is missing", "write one here"
        if word:
            mistake = f"the word {_excerpt(word[0])} is not in quotes"
            way_out = "put it in double quotes"
        elif character in "-+":
            mistake, way_out = f"no digit follows the sign {character}", "write a number"
        elif character == ",":
            mistake, way_out = "there is a comma instead of a value", "remove the comma"
        elif character not in "]}:":
            mistake, way_out = f"no value begins with {character}", "write a value here"
    return Problem(mistake=mistake, way_out=way_out, position=position)


def _excerpt(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
