"""What the command line shows a person: tables of certificates, metrics and predictions. Knows Rich
and the bundle.

What comes from files and users is a `Text`: a path such as `x[/a]` is no markup.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.bundle.manifest import Manifest
from evalmode.bundle.store import Bundle

if TYPE_CHECKING:
    from evalmode.export.audit.site import Site
    from evalmode.model.data_set import DataSet

NAMED = 10  # classes that are named; of more, only the number is said

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.UNPROVEN: "yellow",
    Verdict.NOT_APPLICABLE: "dim",
}


def records_table(records: Iterable[Record], *, title: str) -> Table:
    """One line a rule; below it stand the reason why it did not pass, the places, and once each
    what to do.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("rule", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured", overflow="fold")
    table.add_column("limit", overflow="fold")
    for record in records:
        verdict = Text(record.verdict, style=_COLOURS[record.verdict])
        table.add_row(Text(record.rule), verdict, Text(record.measured), Text(record.limit))
        if record.verdict is not Verdict.PASS:
            table.add_row("", "", Text(record.why, style="bold"), "")
        for line in _found(record):
            table.add_row("", "", line, "")
    return table


def _found(record: Record) -> Iterator[Text]:
    yield from (Text(str(finding)) for finding in record.findings)
    for fix in dict.fromkeys(finding.fix for finding in record.findings if finding.fix):
        yield Text(fix, style="italic")


def sites_table(sites: Iterable[Site]) -> Table:
    """One line a site of an audit: what it is, what was measured, and by how much training and eval
    differ.
    """
    table = Table(title="expectation gap", title_justify="left")
    for column in ("site", "kind", "p", "keep rate", "train scale", "eval scale", "gap"):
        table.add_column(column, overflow="fold")
    for site in sites:
        name = f"{site.name} ({site.type})"
        colour = {None: "green", Severity.ERROR: "bold red", Severity.UNPROVEN: "yellow"}.get(
            site.severity, "cyan"
        )
        table.add_row(
            Text(name),
            Text(site.kind, style=colour),
            _number(site.p),
            _measured(site.keep_rate, site.keep_interval),
            _number(site.train_scale),
            _number(site.eval_scale),
            _measured(site.gap, site.gap_interval),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _measured(value: float | None, interval: tuple[float, float] | None) -> str:
    return (
        _number(value)
        if interval is None
        else f"{_number(value)} [{interval[0]:.4g}, {interval[1]:.4g}]"
    )


def metrics_table(metrics: Mapping[str, object], *, title: str = "metrics") -> Table:
    """One line a part of the data, one column a measure; what is not such a table is a line of its
    own. Classes without rows, which count 0 in the macro-F1, are named beside it.
    """
    parts = {
        name: _with_untested_classes(value)
        for name, value in metrics.items()
        if isinstance(value, Mapping)
    }
    columns = list(dict.fromkeys(column for part in parts.values() for column in part))
    table = Table(
        "data", *(Column(Text(column)) for column in columns), title=title, title_justify="left"
    )
    for name, part in parts.items():
        table.add_row(Text(name), *(Text(_shown(part.get(column, ""))) for column in columns))
    for name, value in metrics.items():
        if name not in parts:
            table.add_row(Text(name), Text(_shown(value)))
    return table


def _with_untested_classes(part: Mapping[str, object]) -> Mapping[str, object]:
    """The measures with `classes` and `not_tested` written behind the macro-F1."""
    names, classes, macro_f1 = (part.get(key) for key in ("not_tested", "classes", "macro_f1"))
    if not isinstance(names, list | tuple) or not isinstance(macro_f1, float):
        return part
    measures = {key: value for key, value in part.items() if key not in ("not_tested", "classes")}
    untested = f"{len(names)} of {classes} classes not tested: {_first(names)}"
    return measures | {"macro_f1": f"{macro_f1:.4f} ({untested})"}


def data_tables(data: DataSet) -> Group:
    """What was read, what of it is not used and why, the classes, and what to be warned of."""
    reading = data.reading
    assert reading is not None, "a data set that was read says so"
    pairs: dict[str, object] = {"source": reading.source}
    if reading.text_column is not None:
        pairs |= {"text column": reading.text_column, "label column": reading.label_column}
    pairs["rows read"] = f"{reading.rows:,}"
    pairs |= {f"left out: {reason}": f"{rows:,}" for reason, rows in reading.left_out.items()}
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {name: Counter(part.labels) for name, part in parts.items()}
    totals = Counter[str]()
    for count in counts.values():
        totals += count
    pairs["rows used"] = f"{totals.total():,}"
    if data.unlabelled:
        pairs["texts without a label"] = f"{len(data.unlabelled):,}"

    classes = Table("class", "rows", *parts, title="classes", title_justify="left")
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    for label in ranked[:NAMED]:
        shares = (f"{counts[name][label]:,}" for name in parts)
        classes.add_row(Text(label), f"{totals[label]:,}", *shares)
    if rest := ranked[NAMED:]:
        shares = (f"{sum(counts[name][label] for label in rest):,}" for name in parts)
        total = sum(totals[label] for label in rest)
        classes.add_row(f"... {len(rest):,} more", f"{total:,}", *shares)

    warnings = list(reading.notes)
    for name in ("validation", "test"):
        absent = [label for label in ranked if not counts[name][label]]
        if absent:
            warnings.append(
                f"{len(absent):,} of {len(ranked):,} classes have too few rows for the {name} part"
                f" and are missing in it: {_first(absent)}"
            )
    for group in data.similar_labels[:NAMED]:
        # What looks alike even so, such as an accent in two ways, is written in escapes.
        looks = {unicodedata.normalize("NFC", repr(label)) for label in group}
        spell = repr if len(looks) == len(group) else ascii
        names = ", ".join(f"{spell(label)} ({totals[label]:,} rows)" for label in group[:NAMED])
        more = f" and {len(group) - NAMED:,} more" if len(group) > NAMED else ""
        warnings.append(
            "classes that differ only in capitals, blanks, composition or invisible characters:"
            f" {names}{more}: spell them alike in the file if they are one class"
        )
    if len(data.similar_labels) > NAMED:
        warnings.append(
            f"{len(data.similar_labels) - NAMED:,} more groups of classes differ in such ways only"
        )
    tables = (pairs_table(pairs, title="data"), classes)
    return Group(*tables, *(Text(f"warning: {text}", style="yellow") for text in warnings))


def _first(names: Sequence[object]) -> str:
    more = f", ... {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def bundle_tables(bundle: Bundle) -> Group:
    """All that a reader may ask of a bundle: what it is, how it was checked, where its dropout was,
    how good it is.
    """
    tables: list[Table] = [_manifest_table(bundle)]
    if bundle.certificate is not None:
        records = bundle.certificate.records
        tables.append(records_table(records, title=f"certificate: {bundle.certificate.verdict}"))
        sites = next((record.sites for record in records if record.rule == "census"), ())
        tables.append(_sites_table(sites))
    tables.append(metrics_table(bundle.manifest.metrics))
    return Group(*tables)


def predictions_table(
    texts: Sequence[str], answers: Sequence[Sequence[tuple[str, float]]]
) -> Table:
    """One line a text, with its best labels and their scores."""
    table = Table("text", "label", "score", "next", title_justify="left")
    for text, top in zip(texts, answers, strict=True):
        (label, score), *rest = top
        others = ", ".join(f"{name} {value:.4f}" for name, value in rest)
        table.add_row(Text(text), Text(label, style="bold"), f"{score:.4f}", Text(others))
    return table


def pairs_table(pairs: Mapping[str, object], *, title: str) -> Table:
    """A name and a value a line."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs.items():
        table.add_row(Text(name), Text(_shown(value), overflow="fold"))
    return table


def _manifest_table(bundle: Bundle) -> Table:
    manifest: Manifest = bundle.manifest
    labels = manifest.labels or ()
    certificate = bundle.certificate
    return pairs_table(
        {
            "name": manifest.name,
            "version": manifest.version,
            "digest": bundle.digest,
            "opset": manifest.opset,
            "inputs": ", ".join(
                f"{item.name} {item.datatype} {list(item.shape)}"
                + "".join(f" {bound}" for bound in item.bounds)
                for item in manifest.inputs
            ),
            "outputs": ", ".join(
                f"{item.name} {item.datatype} {list(item.shape)}" for item in manifest.outputs
            ),
            "front end": "none"
            if manifest.frontend is None
            else _flat(manifest.frontend.model_dump()),
            "labels": f"{len(labels)}: {', '.join(labels)}",
            **{name: _flat(value) for name, value in manifest.provenance.items()},
            "certified on": "nothing"
            if certificate is None
            else _flat(certificate.platform.model_dump()),
            **{f"sha256 of {name}": sha256 for name, sha256 in manifest.files.items()},
        },
        title="manifest",
    )


def _sites_table(sites: Sequence[str]) -> Table:
    table = Table("dropout site", "in the graph", title="census", title_justify="left")
    for site in sites:
        name, _, state = site.rpartition(": ")
        table.add_row(Text(name), Text(state))
    return table


def _flat(value: object) -> object:
    """A record as words: `seed 0, width 96`; what is unset is left out."""
    if not isinstance(value, Mapping):
        return value
    return ", ".join(f"{name} {_list(item)}" for name, item in value.items() if item is not None)


def _list(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
