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

A network of your own is made of the layers, trained as any other, and frozen for the export:

    import copy

    import torch
    import torch.nn.functional as F
    from torch import nn

    from evalmode.export.convert import convert
    from evalmode.export.exact.prove import prove
    from evalmode.export.graph import graph_of
    from evalmode.model.dropout import Dropout
    from evalmode.model.exact import layers
    from evalmode.model.exact.formats import HIDDEN, LOGITS, MASKED, NORMED, STREAM, pooled_format

    WIDTH, POSITIONS, LABELS = 32, 16, 2

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(
                100,
                WIDTH,
                positions=POSITIONS,
                ids_per_position=1,
                ngram_dropout=nn.Identity(),
                dropout=Dropout(0.1),
            )
            self.norm = layers.RmsNorm(WIDTH)  # without weights, so all places share it
            self.attention = layers.Attention(
                WIDTH, heads=2, positions=POSITIONS, dropout=Dropout(0.1)
            )
            self.up = layers.Linear(WIDTH, 2 * WIDTH, reads=NORMED, writes=HIDDEN)
            self.down = layers.Linear(2 * WIDTH, WIDTH, reads=HIDDEN, writes=STREAM)
            pooled = pooled_format(WIDTH, weight_bits=8)
            self.pooling = layers.Pooling(positions=POSITIONS, writes=pooled)
            self.head = layers.Linear(WIDTH, LABELS, reads=pooled, writes=LOGITS)

        def forward(self, ids):  # (B, T), 0 is padding
            real = (ids != 0).float()  # (B, T)
            mask = ((real - 1.0) * -MASKED)[:, None, None, :]  # (B, 1, 1, T)
            x = self.embedding(ids.unsqueeze(-1))  # (B, T, D)
            x = x + self.attention(self.norm(x), mask)
            x = x + self.down(self.up(self.norm(x)))
            return self.head(self.pooling(self.norm(x), real).squeeze(1))  # (B, LABELS)

    torch.manual_seed(0)
    network = Classifier()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.003)
    ids = torch.randint(1, 100, (64, 9))
    labels = (ids[:, 0] > 50).long()
    for _ in range(20):
        loss = F.cross_entropy(network(ids), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    network.eval()
    frozen = copy.deepcopy(network)
    layers.freeze(frozen)
    assert torch.equal(frozen(ids), network(ids))
    converted = convert(
        frozen,
        {"ids": ids},
        dynamic_axes={"ids": {0: "batch", 1: "length"}},
        outputs=["logits"],
    )
    proof = prove(
        graph_of(converted.model), ranges={"ids": (0, 99)}, largest={"length": POSITIONS}
    )
    print(proof)  # proved

What the layers allow follows from the 24 bits, with the largest integers of the table above:

    sums of a linear layer      inputs * 128 * 127 <= 2^24      1,032 inputs of the format NORMED
                                inputs * 255 * 127 <= 2^24      518 inputs of the format HIDDEN
    scores                      2 * K * 127^2 < 2^22 = -MASKED  127 numbers a head
    attention over values       T * 255 * 127 <= 2^24           518 positions
    pooling                     T * 128 < 2^(24 - b)            b bits for 1 / T, chosen to fit
    norm                        D * c^2 < 2^24                  c, a clip, chosen to fit
    mean of table rows          G ids, 1 / G a power of two     128 ids a position
    residual stream             sum of all that is added        depends on the weights

Beyond them:

- `weight_bits=7` makes 63 of 127, which doubles the first two limits.
- Trained weights use a fifth to two fifths of the worst sum. `Linear.reach` says how much, and
  `freeze` raises ValueError only if these weights need more than 24 bits.
- A sum can be split: two layers that read half of the inputs each, and write a format with a range.
  Each result is floored and clipped by itself, so both have 8 bits, and their sum has 9.
- The residual stream is too large only with many layers or large weights: a higher weight decay, or
  a norm and a Linear that writes a clipped format in place of the stream.

`evalmode verify model.onnx --require-exact --range ids=0:99 --largest length=16` proves the file.

    formats.py      the formats, and the limits on width, length and so on that they imply
    gradients.py    floor, norm and softmax: exact values with the gradients of the real functions
    tables.py       the tables of the norm, the softmax and the pooling
    layers.py       the layers, for networks of your own
    network.py      the classifier made of them
"""
