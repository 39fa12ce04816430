"""Exact arithmetic: a transformer of which no result is ever rounded.

Floating-point addition is associative where nothing is rounded. Here every number is an integer
times a power of two, and every sum and product of them fits the 24 bits of a float32 significand.
So no batch size, padding, number of threads, order of summation, fused multiply-add or instruction
set can change a bit of the logits. The one operation that discards anything is `floor`.

A tensor holds integers in float32. Its format says what they mean: an integer n stands for the real
number n * 2^-k. The formats of the network, which `formats.py` defines:

    tensor                            integers              k       format
    embedding table                   -127 .. 127           7       TABLE
    position vectors                  -32768 .. 32767      12       POSITION
    residual stream, in quarters      below 2^24 quarters  12       STREAM
    output of a norm                  -128 .. 127           5       NORMED
    queries, keys, values, mixed      -127 .. 127           5       PROJECTED
    attention weights                 0 .. 255              8       ATTENTION
    hidden layer after its ReLU       0 .. 255              5       HIDDEN
    pooled vector                     -1023 .. 1023         8       pooled_format(width)
    weights of linear layers          -127 .. 127 times a power of two for each output channel

A linear layer divides its sums by a power of two, to bring them to the format of its output. That
factor is part of its weights and costs no operation: y = clip(floor(a @ W + b)), with the 1/2 that
makes floor round to nearest in b. There is no division, no root and no exponential: the norm and
the softmax read them from tables.

Training is quantisation-aware. `floor` and `clip` have their exact values in the forward pass, and
in the backward pass the gradient goes through them as if they were not there, except where a value
was clipped (the straight-through estimator, Bengio et al. 2013).

    formats.py      the formats, and the limits on width, length and so on that they imply
    gradients.py    floor, norm and softmax: exact values with the gradients of the real functions
    tables.py       the tables of the norm, the softmax and the pooling
    layers.py       the layers, for networks of your own
    network.py      the classifier made of them
"""
