"""The known operators: those that neither draw nor train, those that draw, and those that train.

`python -m tests.export.operator_table` writes this file from the schemas of onnx, and a test
compares both. The names are listed by domain, and the domain of ONNX is the empty string. Operators
with a training mode are in none of the tables: `operators.py` checks the mode of each such node.
"""

from __future__ import annotations

# The newest opset of each domain whose operators have been reviewed.
NEWEST_OPSETS = {
    "": 28,
    "ai.onnx.ml": 5,
    "ai.onnx.preview": 1,
    "ai.onnx.preview.training": 1,
}

# Operators that neither draw nor train.
QUIET = {
    "": """
        Abs Acos Acosh Add Affine AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention
        AveragePool BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast
        CastLike CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat
        ConcatFromSequence Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh Crop
        CumProd CumSum DFT DeformConv DepthToSpace DequantizeLinear Det Div DynamicQuantizeLinear
        DynamicSlice Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU GRUUnit Gather
        GatherElements GatherND Gelu Gemm GivenTensorFill GlobalAveragePool GlobalLpPool
        GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow
        HardSigmoid HardSwish Hardmax Identity If ImageDecoder ImageScaler InstanceNormalization
        IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log
        LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool
        Mean MeanVarianceNormalization MelWeightMatrix MemcpyFromHost MemcpyToHost Min Mish Mod Mul
        Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero Not OneHot Optional
        OptionalGetElement OptionalHasElement Or PRelu Pad ParametricSoftplus Pow QLinearConv
        QLinearMatMul QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2
        ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding
        Round STFT Scale ScaledTanh Scan Scatter ScatterElements ScatterND Selu SequenceAt
        SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap
        Shape Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Sinh Size Slice Softmax
        SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze
        StringConcat StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter
        TfIdfVectorizer ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample Where
        Xor
    """,
    "ai.onnx.ml": """
        ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer
        Imputer LabelEncoder LinearClassifier LinearRegressor Normalizer OneHotEncoder SVMClassifier
        SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ZipMap
    """,
    "ai.onnx.preview": """
        FlexAttention
    """,
    "com.microsoft": """
        Attention AttnLSTM BeamSearch BiasAdd BiasGelu BiasSoftmax BiasSplitGelu BifurcationDetector
        BranchwiseRMSNorm CDist CausalConvWithState ComplexMul ComplexMulConj
        ConvTransposeWithDynamicPads CropAndResize DecoderAttention DecoderMaskedMultiHeadAttention
        DecoderMaskedSelfAttention DequantizeBFP DequantizeLinear DequantizeWithOrder
        DynamicQuantizeLSTM DynamicQuantizeMatMul DynamicSparseAttention DynamicTimeWarping
        EmbedLayerNormalization EngramGate ExpandDims FastGelu FusedConv FusedGemm FusedMatMul
        FusedMatMulActivation GatedAdd GatedDeltaNet GatedRMSNorm GatedRelativePositionBias
        GatherBlockQuantized GatherND Gelu GemmFastGelu GemmFloat8 GemmaRotaryEmbedding GreedySearch
        GridSample GroupNorm GroupQueryAttention HyperConnectionPostMix HyperConnectionPreMix
        Inverse Irfft IsAllFinite LinearAttention LinearAttentionGate LongformerAttention
        MRotaryEmbedding MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4
        MatMulFpQ4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits MatMulNBitsMlp MatMulNBitsQkv
        MaxpoolWithMask MoE MulInteger MultiHeadAttention MurmurHash3 NGramHashMapping
        NGramRepeatBlock NhwcConv NhwcFusedConv NhwcMaxPool PackedAttention PackedMultiHeadAttention
        PackedSparseAttentionIndexer Pad PagedAttention QAttention QEmbedLayerNormalization QGemm
        QLinearAdd QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool
        QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere
        QMoE QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention
        QOrderedMatMul QuantizeBFP QuantizeLinear QuantizeWithOrder QuickGelu Range ReduceSumInteger
        RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding SampleOp ScaledSiLU
        SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization SparseAttention
        SparseAttentionIndexer SparsePagedAttention SparseToDenseMatMul Tokenizer TorchEmbedding
        TransposeMatMul Trilu UnfoldTensor Unique VarlenCausalConvWithState VarlenNGramHashMapping
        WhisperBeamSearch WordConvEmbedding
    """,
    "com.microsoft.nchwc": """
        AveragePool Conv GlobalAveragePool GlobalMaxPool MaxPool ReorderInput ReorderOutput Upsample
    """,
    "com.ms.internal.nhwc": """
        AveragePool Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
        GridSample InstanceNormalization LRN LpPool MaxPool MaxUnpool QLinearAveragePool QLinearConv
        QLinearConvTranspose Resize SpaceToDepth
    """,
}

# Operators that draw random numbers.
DRAWS = {
    "": """
        Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    """,
    "com.microsoft": """
        RandomNormal RandomUniform Sampling
    """,
}

# Operators that only training graphs contain.
TRAINS = {
    "ai.onnx.preview.training": """
        Adagrad Adam Gradient Momentum
    """,
    "com.microsoft": """
        AdamOptimizer AdamWOptimizer BatchNormInternal BatchNormalizationGrad BiasSoftmaxDropout
        BitmaskDropoutGrad DropoutGrad GRUGrad GRUTraining InPlaceAccumulator InPlaceAccumulatorV2
        LSTMGrad LSTMTraining LambOptimizer SGDOptimizer SGDOptimizerV2 SoftmaxDropoutGrad
        TrainableDropout ZeroGradient
    """,
}
