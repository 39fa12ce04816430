"""What torch's exporter needs to be told, to forget, or not to say; each seen in torch 2.13."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

_operators = cache(ONNXRegistry.from_torchlib)


def forget_unrolled_loops() -> None:
    """After one export torch keeps, for its recurrent operators, a kernel that fixes the length at
    the next.
    """
    for name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        operator = getattr(torch.ops.aten, name)
        for overload in operator.overloads():
            getattr(operator, overload)._dispatch_cache.clear()


@contextmanager
def one_operator_table() -> Iterator[None]:
    """torch makes its table of operators anew for every export, which takes longer than a small
    export itself.
    """
    made_anew = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_operators)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = made_anew  # type: ignore[method-assign]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed; its errors are
    exceptions.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
