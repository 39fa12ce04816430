"""Run rows of a model without an engine, and make inputs and parts of ONNX models."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper


def answer_alone(job):
    """The answer to one job, a pair of bucket and row, in a batch without other rows."""
    bucket, row = job
    (answer,) = bucket.run([row])
    if isinstance(answer, Exception):
        raise answer
    return answer


def answers_together(jobs, *, size):
    """The answers to jobs of one bucket in a batch of `size` rows, filled up with copies."""
    (bucket,) = {bucket for bucket, _ in jobs}
    rows = [row for _, row in jobs]
    return bucket.run([*rows, *rows[-1:] * (size - len(rows))])[: len(rows)]


def floats(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def random_inputs(*shape, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
