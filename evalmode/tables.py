"""Tables of the command line: certificates, audits, data, metrics and predictions.

Whatever comes from a file or a user becomes a `Text`. Rich would read a plain string such as
`x[/a]` as markup.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from evalmode.bundle.certificate import Record, Severity, Statement, Verdict
from evalmode.bundle.store import Bundle

if TYPE_CHECKING:
    from evalmode.bundle.comparison import Comparison
    from evalmode.export.audit.site import SiteReport
    from evalmode.model.data_set import DataSet

# Of a longer list, the first are named and the rest counted: a table fits on a screen.
MAX_NAMES = 10

_VERDICT_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.UNPROVEN: "yellow",
    Verdict.NOT_APPLICABLE: "dim",
}
_SEVERITY_COLOURS = {
    None: "green",
    Severity.ERROR: "bold red",
    Severity.UNPROVEN: "yellow",
    Severity.WARNING: "cyan",
}


def records_table(records: Iterable[Record], *, title: str) -> Table:
    """One line per rule.

    Below a rule that did not pass are the reason, its findings, and each remedy once.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("rule", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured", overflow="fold")
    table.add_column("limit", overflow="fold")
    for record in records:
        verdict = Text(record.verdict, style=_VERDICT_COLOURS[record.verdict])
        table.add_row(Text(record.rule), verdict, Text(record.measured), Text(record.limit))
        if record.verdict is not Verdict.PASS:
            table.add_row("", "", Text(record.why, style="bold"), "")
        # A rule that passes may have warnings.
        for finding in record.findings:
            table.add_row("", "", Text(str(finding)), "")
        for fix in dict.fromkeys(finding.fix for finding in record.findings if finding.fix):
            table.add_row("", "", Text(fix, style="italic"), "")
    return table


def sites_table(sites: Iterable[SiteReport]) -> Table:
    """One line per site of an audit: its kind, what was measured, and the gap to eval mode."""
    table = Table(title="expectation gap", title_justify="left")
    for column in ("site", "kind", "p", "keep rate", "train scale", "eval scale", "gap"):
        table.add_column(column, overflow="fold")
    for site in sites:
        table.add_row(
            Text(f"{site.name} ({site.type})"),
            Text(site.kind, style=_SEVERITY_COLOURS[site.severity]),
            _number(site.p),
            _number(site.keep_rate, site.keep_interval),
            _number(site.train_scale),
            _number(site.eval_scale),
            _number(site.gap, site.gap_interval),
        )
    return table


def metrics_table(metrics: Mapping[str, object], *, title: str = "metrics") -> Table:
    """One line per part of the data, and one column per measure.

    A metric that is no mapping of measures has a line by itself. A class without test rows counts 0
    in the macro-F1, so these classes are named beside it.
    """
    parts: dict[str, Mapping[str, object]] = {}
    for name, measures in metrics.items():
        if not isinstance(measures, Mapping):
            continue
        untested, macro_f1 = measures.get("not_tested"), measures.get("macro_f1")
        # A bundle's metrics may be any JSON: other types are printed as they are.
        if isinstance(untested, list | tuple) and isinstance(macro_f1, float):
            classes = f"{len(untested)} of {measures.get('classes')} classes not tested"
            row = dict(measures)
            row["macro_f1"] = f"{macro_f1:.4f} ({classes}: {_first_names(untested)})"
            del row["not_tested"]
            row.pop("classes", None)
            measures = row
        parts[name] = measures

    columns = list(dict.fromkeys(chain.from_iterable(parts.values())))
    table = Table(
        "data", *(Column(Text(column)) for column in columns), title=title, title_justify="left"
    )
    for name, part in parts.items():
        table.add_row(Text(name), *(Text(_value(part.get(column, ""))) for column in columns))
    for name, value in metrics.items():
        if name not in parts:
            table.add_row(Text(name), Text(_value(value)))
    return table


def data_tables(data: DataSet) -> Group:
    """What was read, what is left out and why, the classes, and warnings about the data."""
    reading = data.reading
    assert reading is not None, "a data set that was read has a record of it"
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

    # The largest classes first, each with its rows in every part; the others are one line.
    classes = Table("class", "rows", *parts, title="classes", title_justify="left")
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    for label in ranked[:MAX_NAMES]:
        shares = [f"{counts[name][label]:,}" for name in parts]
        classes.add_row(Text(label), f"{totals[label]:,}", *shares)
    others = ranked[MAX_NAMES:]
    if others:
        shares = [f"{sum(counts[name][label] for label in others):,}" for name in parts]
        other_rows = sum(totals[label] for label in others)
        classes.add_row(f"... {len(others):,} more", f"{other_rows:,}", *shares)

    warnings = list(reading.notes)
    for name in ("validation", "test"):
        absent = [label for label in ranked if not counts[name][label]]
        if absent:
            warnings.append(
                f"{len(absent):,} of {len(ranked):,} classes have too few rows for the {name} part"
                f" and are missing in it: {_first_names(absent)}"
            )
    for group in data.similar_labels[:MAX_NAMES]:
        # Labels that still look alike, such as an accent in its two forms, are shown as escapes.
        looks = {unicodedata.normalize("NFC", repr(label)) for label in group}
        quote = repr if len(looks) == len(group) else ascii
        names = ", ".join(f"{quote(label)} ({totals[label]:,} rows)" for label in group[:MAX_NAMES])
        if len(group) > MAX_NAMES:
            names += f" and {len(group) - MAX_NAMES:,} more"
        warnings.append(
            "classes that differ only in capitals, blanks, composition or invisible characters:"
            f" {names}: spell them alike in the file if they are one class"
        )
    if len(data.similar_labels) > MAX_NAMES:
        warnings.append(
            f"{len(data.similar_labels) - MAX_NAMES:,} more groups of classes differ in such ways"
            " only"
        )
    tables = (pairs_table(pairs, title="data"), classes)
    return Group(*tables, *(Text(f"warning: {text}", style="yellow") for text in warnings))


def bundle_tables(bundle: Bundle) -> Group:
    """The manifest, the certificate, the dropout census and the metrics of a bundle."""
    manifest, certificate = bundle.manifest, bundle.certificate
    labels = manifest.labels or ()
    pairs: dict[str, object] = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": bundle.digest,
        "opset": manifest.opset,
        "inputs": ", ".join(
            " ".join([item.name, item.datatype, str(list(item.shape)), *map(str, item.bounds)])
            for item in manifest.inputs
        ),
        "outputs": ", ".join(
            f"{item.name} {item.datatype} {list(item.shape)}" for item in manifest.outputs
        ),
        "front end": "none",
        "labels": f"{len(labels)}: {', '.join(labels)}",
    }
    if manifest.frontend is not None:
        pairs["front end"] = _flat(manifest.frontend.model_dump())
    pairs |= {name: _flat(value) for name, value in manifest.provenance.items()}
    pairs["certified on"] = "nothing"
    if certificate is not None:
        pairs["certified on"] = _flat(certificate.platform.model_dump())
    pairs |= {f"sha256 of {name}": sha256 for name, sha256 in manifest.files.items()}
    tables = [pairs_table(pairs, title="manifest")]

    if certificate is not None:
        tables.append(
            records_table(certificate.records, title=f"certificate: {certificate.verdict}")
        )
        if certificate.statements:
            tables.append(statements_table(certificate.statements))
        census = Table("dropout site", "in the graph", title="census", title_justify="left")
        for record in certificate.records:
            if record.rule != "census":
                continue
            for site in record.sites:
                name, _, state = site.rpartition(": ")
                census.add_row(Text(name), Text(state))
        tables.append(census)
    tables.append(metrics_table(manifest.metrics))
    return Group(*tables)


def statements_table(statements: Iterable[Statement]) -> Table:
    """One line per statement, and its first reasons if it does not hold."""
    table = Table("statement", "text", title="statements", title_justify="left")
    for statement in statements:
        text = statement.why
        if statement.holds and statement.measured:
            text = f"{text}: {statement.measured}"
        table.add_row(Text(statement.name), Text(text, overflow="fold"))
        for reason in statement.reasons[1:MAX_NAMES]:
            table.add_row("", Text(str(reason), overflow="fold"))
    return table


def predictions_table(
    texts: Sequence[str], answers: Sequence[Sequence[tuple[str, float]]]
) -> Table:
    """One line per text: its best label with the score, and the next labels with theirs."""
    table = Table("text", "label", "score", "next", title_justify="left")
    for text, labels in zip(texts, answers, strict=True):
        (label, score), *following = labels
        others = ", ".join(f"{name} {value:.4f}" for name, value in following)
        table.add_row(Text(text), Text(label, style="bold"), f"{score:.4f}", Text(others))
    return table


def comparisons_table(comparisons: Sequence[Comparison], *, title: str) -> Table:
    """One line per setting: how many rows have other bits there, and by how much."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("rows differ", justify="right", no_wrap=True)
    table.add_column("at most by", justify="right", no_wrap=True)
    table.add_column("other label", justify="right", no_wrap=True)
    for comparison in comparisons:
        setting = Text(str(comparison.setting))
        if comparison.refusal:
            table.add_row(setting, Text(comparison.refusal, style="yellow"), "", "")
            continue
        colour = "yellow" if comparison.differing else "green"
        largest = "not finite" if comparison.largest is None else f"{comparison.largest:.2g}"
        table.add_row(
            setting,
            Text(f"{comparison.differing:,} of {comparison.rows:,}", style=colour),
            largest if comparison.differing else "",
            f"{comparison.changed_labels:,}" if comparison.changed_labels else "",
        )
    return table


def pairs_table(pairs: Mapping[str, object], *, title: str) -> Table:
    """One line per name and value."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs.items():
        table.add_row(Text(name), Text(_value(value), overflow="fold"))
    return table


def _number(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A measured number with four digits, and its confidence interval; empty for None."""
    text = "" if value is None else f"{value:.4g}"
    if interval is None:
        return text
    low, high = interval
    return f"{text} [{low:.4g}, {high:.4g}]"


def _value(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _first_names(names: Sequence[object]) -> str:
    text = ", ".join(map(str, names[:MAX_NAMES]))
    if len(names) > MAX_NAMES:
        text += f", ... {len(names) - MAX_NAMES:,} more"
    return text


def _flat(value: object) -> object:
    """A record as one line: "seed 0, width 96". A key without a value is left out."""
    if not isinstance(value, Mapping):
        return value
    parts = []
    for name, item in value.items():
        if isinstance(item, list | tuple):
            item = " ".join(map(str, item))
        if item is not None:
            parts.append(f"{name} {item}")
    return ", ".join(parts)
