"""What torch's exporter needs to be told, to forget, or not to say; each seen in torch 2.13."""

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
    """Without the exporter's remarks: packages that are not installed, traces that failed and are
    tried again. Its errors are exceptions.
    """
    names = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
    known = [name for name in logging.root.manager.loggerDict if name.startswith(names)]
    loggers = [logging.getLogger(name) for name in {*names, *known}]
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
