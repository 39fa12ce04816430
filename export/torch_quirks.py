"""Work-arounds for torch's ONNX exporter; each of the quirks was seen in torch 2.13."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

_operator_table = cache(ONNXRegistry.from_torchlib)


def forget_unrolled_loops() -> None:
    """Clear the kernels that an export leaves in torch's recurrent operators.

    Such a kernel has its loop unrolled, and would fix the length of the next export.
    """
    for name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        operator = getattr(torch.ops.aten, name)
        for overload in operator.overloads():
            getattr(operator, overload)._dispatch_cache.clear()


@contextmanager
def one_operator_table() -> Iterator[None]:
    """Build torch's table of operators once for all exports.

    torch builds it for each export, which takes longer than a small export itself.
    """
    original = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_operator_table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter logs and prints about missing packages, and about traces that
    failed and that it tries again in another way. Its errors are exceptions, and still reach the
    caller.
    """
    names = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
    children = [name for name in logging.root.manager.loggerDict if name.startswith(names)]
    loggers = [logging.getLogger(name) for name in {*names, *children}]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        # On a failure torch prints the whole trace as well.
        silence = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
