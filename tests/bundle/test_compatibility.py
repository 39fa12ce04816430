"""Every bundle that was ever written stays readable.

`written_by/` has bundles of each schema version, which must open and answer today: `schema_*` of
the manifest, `certificate_*` of the certificate. `schemas.json` in it records the fields of each
schema version.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
from pydantic import JsonValue
from typer.testing import CliRunner

from evalmode import cli
from evalmode.bundle.certificate import Certificate, certificate_schema_version
from evalmode.bundle.known_answers import replay
from evalmode.bundle.manifest import Frozen, Manifest, lowest_schema_version
from evalmode.bundle.session import open_session
from evalmode.bundle.store import open_bundle

WRITTEN = Path(__file__).with_name("written_by")
DIGESTS = {
    "certificate_2/counted/1": "1674f967624631cc7d5babc040c4febac32bf4ea75a87831114dde5b3cea1b34",
    "schema_1/classifier/1": "f22d53f519657afe780339241ab4a02fe71231019fc0a6898661be3313e7c715",
    "schema_1/small/1": "7f75f1aa87a1f91830aaf8c2d8c086b6fbcc302107322b0ef4b05c2dc0214f8f",
    "schema_2/columns/1": "7975bac22f9051fec1a668c220ff754a825d3267583472a4c6e6881d0545298a",
}


def fields_of(schema: JsonValue, definitions: dict[str, JsonValue]) -> JsonValue:
    """The part of a JSON schema that describes fields and their values.

    Prose, the names of classes, and defaults that depend on the machine may change.
    """
    if isinstance(schema, list):
        return [fields_of(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return fields_of(definitions[str(schema["$ref"]).removeprefix("#/$defs/")], definitions)
    fields: dict[str, JsonValue] = {}
    for key, value in schema.items():
        # A field may itself be called "title": then the value is a schema and not a text.
        is_prose = key in ("description", "title") and isinstance(value, str)
        is_names = key == "$defs" or (key == "mapping" and "propertyName" in schema)
        # NgramSpec.unicode defaults to the Unicode version of the running Python.
        is_of_this_python = key == "default" and value == unicodedata.unidata_version
        if not (is_prose or is_names or is_of_this_python):
            fields[key] = fields_of(value, definitions)
    return fields


def schema_sha256(model: type[Frozen]) -> str:
    schema = model.model_json_schema()
    fields = fields_of(schema, schema["$defs"])
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def test_every_written_bundle_is_listed_here() -> None:
    folders = {file.parent.relative_to(WRITTEN) for file in WRITTEN.glob("**/manifest.json")}
    assert sorted(map(str, folders)) == sorted(DIGESTS)


@pytest.mark.parametrize("folder", DIGESTS)
def test_a_bundle_of_an_earlier_version_opens_with_its_digest(folder: str) -> None:
    bundle = open_bundle(WRITTEN / folder)
    assert bundle.digest == DIGESTS[folder]
    assert bundle.certificate is not None
    assert bundle.certificate.digest == bundle.digest


@pytest.mark.parametrize("folder", DIGESTS)
def test_a_bundle_of_an_earlier_version_gives_its_known_answers(folder: str) -> None:
    bundle = open_bundle(WRITTEN / folder)
    session = open_session(bundle.model)
    assert bundle.certificate is not None
    assert bundle.known_answers()
    # raises KnownAnswersDiffer
    replay(
        bundle.known_answers(),
        session.run,
        certificate=bundle.certificate,
        platform=session.platform,
        frontend=bundle.frontend(),
    )


@pytest.mark.parametrize("folder", DIGESTS)
def test_a_bundle_of_an_earlier_version_passes_verify(folder: str) -> None:
    result = CliRunner().invoke(cli.app, ["verify", str(WRITTEN / folder)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("model", [Manifest, Certificate])
def test_the_fields_of_a_schema_version_never_change(model: type[Frozen]) -> None:
    record, version = model.__name__.lower(), str(model.model_fields["schema_version"].default)
    recorded = json.loads((WRITTEN / "schemas.json").read_text())[record].get(version)
    assert schema_sha256(model) == recorded, (
        f"the fields of {model.__name__} differ from those of schema_version {version}: bump"
        " schema_version, keep reading the earlier versions, add bundles written by the new one"
        f" to {WRITTEN.name}/, and record its schema's sha256 in {WRITTEN.name}/schemas.json"
    )


@pytest.mark.parametrize("record", ["manifest", "certificate"])
def test_every_recorded_schema_version_has_a_bundle_here(record: str) -> None:
    files = WRITTEN.glob(f"**/{record}.json")
    versions = {str(json.loads(file.read_bytes())["schema_version"]) for file in files}
    assert versions == set(json.loads((WRITTEN / "schemas.json").read_text())[record]), (
        f"each schema_version of a {record} is recorded in schemas.json and has a bundle"
    )


def test_a_manifest_without_bounds_is_written_as_the_version_that_earlier_releases_read() -> None:
    for folder in DIGESTS:
        manifest = open_bundle(WRITTEN / folder).manifest
        assert manifest.schema_version == lowest_schema_version(manifest.inputs)
        assert manifest.canonical() == (WRITTEN / folder / "manifest.json").read_bytes()


def test_a_certificate_without_statements_is_written_as_version_1() -> None:
    for folder in DIGESTS:
        certificate = open_bundle(WRITTEN / folder).certificate
        assert certificate is not None
        assert certificate.schema_version == certificate_schema_version(certificate.statements)
        assert certificate.canonical() == (WRITTEN / folder / "certificate.json").read_bytes()
