"""The query of a request: its parameters, each at most once, and none that is not known.

`POST /v1/predict` takes the same query with a JSON body and with lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from evalmode.service.errors import InvalidField
from evalmode.service.strict_json import shown, shown_key, whole_number


@dataclass(frozen=True, kw_only=True)
class PredictQuery:
    """What a query says about predictions; None stands for a parameter that it leaves out."""

    top_k: int | None = None
    truncate: bool | None = None
    model: str | None = None
    version: str | None = None


def parse_predict_query(items: Iterable[tuple[str, str]], *, max_top_k: int) -> PredictQuery:
    """The query with these parameters. Raises InvalidField, naming the parameter and its value."""
    names = [field.name for field in fields(PredictQuery)]
    parameters = single_parameters(items, known=names)
    top_k: int | None = None
    if (text := parameters.get("top_k")) is not None:
        top_k = whole_number(text)
        if top_k is None or not 1 <= top_k <= max_top_k:
            raise InvalidField(
                f"top_k must be an integer from 1 to {max_top_k}, got {shown(text)}", field="top_k"
            )
    truncate = parameters.get("truncate")
    if truncate not in (None, "true", "false"):
        raise InvalidField(
            f"truncate must be true or false, got {shown(truncate)}", field="truncate"
        )
    return PredictQuery(
        top_k=top_k,
        truncate=None if truncate is None else truncate == "true",
        model=parameters.get("model"),
        version=parameters.get("version"),
    )


def single_parameters(items: Iterable[tuple[str, str]], *, known: Sequence[str]) -> dict[str, str]:
    """The parameters by name. Raises InvalidField for one that is not `known` or stands twice."""
    parameters: dict[str, str] = {}
    for name, value in items:
        if name not in known:
            raise InvalidField(
                f"{shown_key(name)} is not a parameter of this query, which may hold"
                f" {', '.join(known)}",
                field=shown_key(name),
            )
        if name in parameters:
            raise InvalidField(f"{name} stands twice in the query: give it once", field=name)
        parameters[name] = value
    return parameters
