"""Rule opaque-op: every operator is one of which it is known whether it draws or trains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import onnx
import onnx.defs

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import Graph, NodeAt
from evalmode.export.rules.stochastic_op import drawing_operators
from evalmode.export.rules.subject import Subject
from evalmode.export.rules.training_mode import JUDGED

RULE = "opaque-op"

_FIX = (
    "export it as standard operators or as a function in the model; or show by repeated runs that"
    " it does not draw"
)

# Schemas that do not say whether they are deterministic: both are plain arithmetic over a window or
# a state.
_KNOWN_QUIET = {
    ("", op) for op in ("LinearAttention", "CausalConvWithState", "DepthToSpace", "SpaceToDepth")
}

# Operators that ONNX Runtime 1.31 has and onnx does not. Each was read for anything that draws or
# trains; those which do are judged by stochastic-op and training-mode. EPContext and Snpe are not
# here: they hold a compiled model. Standard names of before ONNX 1.6, which ONNX Runtime still
# runs, and those that its optimiser writes:
_LEGACY = """
    Affine Crop DynamicSlice GRUUnit GivenTensorFill ImageScaler LayerNormalization
    MeanVarianceNormalization MemcpyFromHost MemcpyToHost ParametricSoftplus Scale ScaledTanh
    SimplifiedLayerNormalization ThresholdedRelu
"""
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
_DRAWING_CONTRIB = "Sampling RandomNormal RandomUniform"
_BLOCKED_LAYOUT = (
    "AveragePool Conv GlobalAveragePool GlobalMaxPool MaxPool ReorderInput ReorderOutput Upsample"
)
_CHANNELS_LAST = """
    AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool
    GlobalMaxPool GridSample InstanceNormalization LRN LpPool MaxPool MaxUnpool QLinearAveragePool
    QLinearConv QLinearConvTranspose Resize SpaceToDepth
"""
_RUNTIMES_OWN = {
    (domain, op)
    for domain, ops in (
        ("", _LEGACY),
        ("com.microsoft", _CONTRIB + _DRAWING_CONTRIB),
        ("com.microsoft.nchwc", _BLOCKED_LAYOUT),
        ("com.ms.internal.nhwc", _CHANNELS_LAST),
    )
    for op in ops.split()
}
_KNOWN = frozenset(_RUNTIMES_OWN | JUDGED)


def check(subject: Subject) -> Record:
    """Unproven for every node whose operator nobody here knows; a function of the model's own is
    what it is made of.
    """
    graph = subject.graph
    findings = [*_too_new(graph), *_opaque(graph)]
    return Record.of(
        RULE,
        findings,
        fine="every operator is known",
        otherwise="operators cannot be shown to be free of randomness",
        measured=f"{len(findings)} of {len(graph.nodes)} nodes",
        limit="0",
    )


def quiet_operators() -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that neither draws nor trains, in no opset that onnx
    knows.
    """
    unknown = onnx.defs.OpSchema.NodeDeterminism.Unknown
    schemas = onnx.defs.get_all_schemas_with_history()
    unclear = {
        (schema.domain, schema.name)
        for schema in schemas
        if schema.node_determinism == unknown  # type: ignore[attr-defined]
    }
    operators = {(schema.domain, schema.name) for schema in schemas} | _RUNTIMES_OWN
    return frozenset(operators - (unclear - _KNOWN_QUIET) - drawing_operators() - JUDGED)


def newest_opsets() -> dict[str, int]:
    """The domains that onnx has schemas of, and the newest opset that it knows of each."""
    return dict(_standard_domains())


def _opaque(graph: Graph) -> Iterator[Finding]:
    for at in graph.nodes:
        if not at.is_call and (why := _why(at)):
            yield Finding(severity=Severity.UNPROVEN, node=at.path, op=at.op, why=why, fix=_FIX)


def _why(at: NodeAt) -> str:
    """Why nothing is known of the operator, or "" where it is known."""
    if (at.domain, at.node.op_type) in _KNOWN:
        return ""
    if at.domain not in _standard_domains():
        return (
            f"{at.op} cannot be shown to be free of randomness: it is not a standard operator, nor"
            " a function here"
        )
    if at.opset == 0:
        return (
            f"{at.op} cannot be shown to be free of randomness: no opset of its domain is imported"
        )
    try:
        schema = onnx.defs.get_schema(at.node.op_type, at.opset, at.domain)
    except onnx.defs.SchemaError:
        return (
            f"{at.op} cannot be shown to be free of randomness: opset {at.opset} has no such"
            " operator"
        )
    if schema.deprecated:
        return (
            f"{at.op} cannot be shown to be free of randomness: opset {at.opset} has done away"
            " with it"
        )
    # Present at run time, absent from onnx's type stubs.
    unknown = schema.node_determinism == onnx.defs.OpSchema.NodeDeterminism.Unknown  # type: ignore[attr-defined]
    if unknown and (at.domain, at.node.op_type) not in _KNOWN_QUIET:
        return (
            f"{at.op} cannot be shown to be free of randomness: onnx itself does not say whether it"
            " draws"
        )
    return ""


def _too_new(graph: Graph) -> Iterator[Finding]:
    """An operator of an opset from after this version of onnx may no longer do what it did."""
    used = {(at.domain, at.opset) for at in graph.nodes}
    for domain, opset in sorted(used):
        newest = _standard_domains().get(domain)
        if newest is not None and opset > newest:
            why = (
                f"opset {opset} of {domain or 'ai.onnx'} is newer than onnx {onnx.__version__},"
                f" which knows {newest}"
            )
            yield Finding(
                severity=Severity.UNPROVEN,
                why=why,
                fix="upgrade onnx, or export with an older opset",
            )


@cache
def _standard_domains() -> dict[str, int]:
    """The domains that onnx has schemas of, and the newest opset that it knows of each."""
    newest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        newest[schema.domain] = max(newest.get(schema.domain, 1), schema.since_version)
    newest[""] = max(newest[""], onnx.defs.onnx_opset_version())
    return newest
