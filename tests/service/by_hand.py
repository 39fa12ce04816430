"""Rows of a model run by hand, as the engine would run them, and parts of models made by hand."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper


def alone(job):
    """The answer of one job by itself."""
    bucket, row = job
    (found,) = bucket.run([row])
    if isinstance(found, Exception):
        raise found
    return found


def together(jobs, *, places):
    """The answers of jobs of one bucket in a batch of so many places."""
    (bucket,) = {bucket for bucket, _ in jobs}
    rows = [row for _, row in jobs]
    return bucket.run([*rows, *rows[-1:] * (places - len(rows))])[: len(rows)]


def floats(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def asked(*shape, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
