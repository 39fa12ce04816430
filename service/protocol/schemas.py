"""The protocol's bodies as JSON schemas, for the OpenAPI documentation.

They validate nothing: `request.py` reads bodies itself, with messages that name the field.
"""

from __future__ import annotations

from typing import Any

from evalmode.service.protocol.datatypes import DATATYPES

_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": ["boolean", "integer", "string"]},
}
_SHAPE: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 1}}
_DATA: dict[str, Any] = {
    "type": "array",
    "description": "The elements, row-major: flat, or nested as the shape says.",
}
_TENSOR: dict[str, Any] = {
    "name": {"type": "string"},
    "datatype": {"type": "string", "enum": list(DATATYPES)},
    "shape": _SHAPE,
    "data": _DATA,
    "parameters": _PARAMETERS,
}

INFER_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "description": "Returned with the response."},
        "parameters": {
            "type": "object",
            "properties": {
                "truncate": {
                    "type": "boolean",
                    "description": "Cut a text that is too long, or refuse it with 400.",
                },
                "binary_data_output": {
                    "type": "boolean",
                    "description": "Write outputs as raw tensors.",
                },
                "timeout": {
                    "type": "integer",
                    "minimum": 0,
                    "description": "Microseconds; 0 means no timeout.",
                },
            },
        },
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": _TENSOR,
                "additionalProperties": False,
            },
        },
        "outputs": {
            "type": "array",
            "description": "The outputs to return, in this order; by default all.",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "binary_data": {"type": "boolean"},
                            "classification": {"type": "integer", "minimum": 1},
                        },
                    },
                },
                "additionalProperties": False,
            },
        },
    },
    "examples": [
        {
            "id": "1",
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [2],
                    "data": ["Ez egy rövid mondat.", "Dit is een zin."],
                }
            ],
        }
    ],
}

INFER_RESPONSE: dict[str, Any] = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {"type": "object", "properties": {"digest": {"type": "string"}}},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": _TENSOR,
            },
        },
    },
}

PARAMETERS_REQUEST: dict[str, Any] = {
    "type": "object",
    "properties": {"parameters": _PARAMETERS},
    "additionalProperties": False,
}
INDEX_REQUEST: dict[str, Any] = {
    "type": "object",
    "properties": {"ready": {"type": "boolean"}},
    "additionalProperties": False,
}
