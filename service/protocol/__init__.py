"""The Open Inference Protocol v2 over REST, as bytes and tensors.

This folder knows no web framework, no model and no engine. A request passes through its modules:

    compression.py   the bytes of a body, decompressed in pieces
    fields.py        its JSON object and the fields in it
    request.py       named input tensors and the requested outputs
    datatypes.py     elements from and to JSON values
    binary.py        elements from and to raw bytes
    response.py      named output tensors, as the body of the response

`metadata.py` and `schemas.py` describe the server, its models and these bodies.
Everything that is wrong with a request is raised as BadRequest (400) or UnsupportedMedia (415).
"""
