"""Rule opaque-op: for every operator it is known whether it draws or trains.

An operator is known, in this order, if

1. it is listed here, or the rule training-mode judges it;
2. its domain is a standard one: onnx has schemas for it;
3. the model imports an opset of that domain;
4. that opset has the operator, and does not deprecate it;
5. the schema says whether the operator is deterministic, or the operator is in `_QUIET_ONNX`.

A call of a function of the model needs no such decision: the nodes in the function are judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import onnx
import onnx.defs

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import NodeAt
from evalmode.export.rules.stochastic_op import drawing_operators
from evalmode.export.rules.subject import Subject
from evalmode.export.rules.training_mode import JUDGED

RULE = "opaque-op"

_FIX = (
    "export it as standard operators or as a function of the model, or show by repeated runs that"
    " it does not draw"
)

# The schemas of these operators do not say whether they are deterministic (onnx 1.23). Each was
# read: they are plain arithmetic over a window or a state.
_QUIET_ONNX = {
    ("", op) for op in ("LinearAttention", "CausalConvWithState", "DepthToSpace", "SpaceToDepth")
}

# Operators that ONNX Runtime 1.31 has and onnx does not. Each was read for anything that draws or
# trains; the rules stochastic-op and training-mode judge those that do. EPContext and Snpe are
# absent, because they hold a compiled model.

# Standard names from before ONNX 1.6, which ONNX Runtime still runs, and names that its optimiser
# writes.
_LEGACY = """
    Affine Crop DynamicSlice GRUUnit GivenTensorFill ImageScaler LayerNormalization
    MeanVarianceNormalization MemcpyFromHost MemcpyToHost ParametricSoftplus Scale ScaledTanh
    SimplifiedLayerNormalization ThresholdedRelu
"""
# The domain com.microsoft.
_CONTRIB = """
    Attention AttnLSTM BeamSearch BiasAdd BiasGelu BiasSoftmax BiasSplitGelu BifurcationDetector
    BranchwiseRMSNorm CDist CausalConvWithState ComplexMul ComplexMulConj
    ConvTransposeWithDynamicPads CropAndResize DecoderAttention DecoderMaskedMultiHeadAttention
    DecoderMaskedSelfAttention DequantizeBFP DequantizeLinear DequantizeWithOrder
    DynamicQuantizeLSTM DynamicQuantizeMatMul DynamicSparseAttention DynamicTimeWarping
    EmbedLayerNormalization EngramGate ExpandDims FastGelu FusedConv FusedGemm FusedMatMul
    FusedMatMulActivation GatedAdd GatedDeltaNet GatedRMSNorm GatedRelativePositionBias
    GatherBlockQuantized GatherND Gelu GemmFastGelu GemmFloat8 GemmaRotaryEmbedding GreedySearch
    GridSample GroupNorm GroupQueryAttention HyperConnectionPostMix HyperConnectionPreMix Inverse
    Irfft IsAllFinite LinearAttention LinearAttentionGate LongformerAttention MRotaryEmbedding
    MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4 MatMulFpQ4
    MatMulInteger16 MatMulIntegerToFloat MatMulNBits MatMulNBitsMlp MatMulNBitsQkv MaxpoolWithMask
    MoE MulInteger MultiHeadAttention MurmurHash3 NGramHashMapping NGramRepeatBlock NhwcConv
    NhwcFusedConv NhwcMaxPool PackedAttention PackedMultiHeadAttention PackedSparseAttentionIndexer
    Pad PagedAttention QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean
    QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QOrderedAttention QOrderedGelu
    QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul QuantizeBFP QuantizeLinear
    QuantizeWithOrder QuickGelu Range ReduceSumInteger RelativePositionBias RemovePadding
    RestorePadding Rfft RotaryEmbedding SampleOp ScaledSiLU SkipGroupNorm SkipLayerNormalization
    SkipSimplifiedLayerNormalization SparseAttention SparseAttentionIndexer SparsePagedAttention
    SparseToDenseMatMul Tokenizer TorchEmbedding TransposeMatMul Trilu UnfoldTensor Unique
    VarlenCausalConvWithState VarlenNGramHashMapping WhisperBeamSearch WordConvEmbedding
"""
# These draw, and the rule stochastic-op fails them.
_DRAWING_CONTRIB = "Sampling RandomNormal RandomUniform"
# What ONNX Runtime writes when it saves a model that it has optimised for a device: operators
# whose tensors are laid out in blocks of channels, or with the channels last.
_BLOCKED_LAYOUT = (
    "AveragePool Conv GlobalAveragePool GlobalMaxPool MaxPool ReorderInput ReorderOutput Upsample"
)
_CHANNELS_LAST = """
    AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool
    GlobalMaxPool GridSample InstanceNormalization LRN LpPool MaxPool MaxUnpool QLinearAveragePool
    QLinearConv QLinearConvTranspose Resize SpaceToDepth
"""
_DOMAINS = {
    "": _LEGACY,
    "com.microsoft": _CONTRIB + _DRAWING_CONTRIB,
    "com.microsoft.nchwc": _BLOCKED_LAYOUT,
    "com.ms.internal.nhwc": _CHANNELS_LAST,
}
_RUNTIME_OPERATORS = {(domain, op) for domain, ops in _DOMAINS.items() for op in ops.split()}
_KNOWN = frozenset(_RUNTIME_OPERATORS | JUDGED)


def check(subject: Subject) -> Record:
    """Unproven for every node with an unknown operator, and for every opset newer than onnx."""
    graph = subject.graph
    findings = []
    # A known operator may have another meaning in a later opset.
    opsets = newest_opsets()
    for domain, opset in sorted({(at.domain, at.opset) for at in graph.nodes}):
        if domain in opsets and opset > opsets[domain]:
            why = (
                f"opset {opset} of {domain or 'ai.onnx'} is newer than onnx {onnx.__version__},"
                f" which knows {opsets[domain]}"
            )
            fix = "upgrade onnx, or export with an older opset"
            findings.append(Finding(severity=Severity.UNPROVEN, why=why, fix=fix))
    for at in graph.nodes:
        problem = "" if at.is_call else _problem(at)
        if problem:
            why = f"{at.op} cannot be shown to be free of randomness: {problem}"
            findings.append(
                Finding(severity=Severity.UNPROVEN, node=at.path, op=at.op, why=why, fix=_FIX)
            )
    return Record.of(
        RULE,
        findings,
        fine="every operator is known",
        otherwise="operators cannot be shown to be free of randomness",
        measured=f"{len(findings)} of {len(graph.nodes)} nodes",
        limit="0",
    )


def quiet_operators() -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that neither draws nor trains in any opset of onnx."""
    schemas = onnx.defs.get_all_schemas_with_history()
    operators = {(schema.domain, schema.name) for schema in schemas} | _RUNTIME_OPERATORS
    undeclared = {(schema.domain, schema.name) for schema in schemas if _is_undeclared(schema)}
    return frozenset(operators - (undeclared - _QUIET_ONNX) - drawing_operators() - JUDGED)


@cache
def newest_opsets() -> Mapping[str, int]:
    """The standard domains, each with the newest opset that onnx knows."""
    newest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        newest[schema.domain] = max(newest.get(schema.domain, 1), schema.since_version)
    newest[""] = max(newest[""], onnx.defs.onnx_opset_version())
    return newest


def _problem(at: NodeAt) -> str:
    """Why the operator of a node is not known, or "" where it is."""
    operator = (at.domain, at.node.op_type)
    if operator in _KNOWN:
        return ""
    if at.domain not in newest_opsets():
        return "it is neither a standard operator nor a function of the model"
    if at.opset == 0:
        return "no opset of its domain is imported"
    try:
        schema = onnx.defs.get_schema(at.node.op_type, at.opset, at.domain)
    except onnx.defs.SchemaError:
        return f"opset {at.opset} has no such operator"
    if schema.deprecated:
        return f"opset {at.opset} deprecates it"
    if _is_undeclared(schema) and operator not in _QUIET_ONNX:
        return "onnx itself does not say whether it draws"
    return ""


def _is_undeclared(schema: onnx.defs.OpSchema) -> bool:
    """Whether a schema does not say whether its operator is deterministic."""
    unknown = onnx.defs.OpSchema.NodeDeterminism.Unknown
    # Present at run time, absent from onnx's type stubs.
    return bool(schema.node_determinism == unknown)  # type: ignore[attr-defined]
