"""Useful work: the floating-point operations and bytes that an answer needs, whatever a contestant spends on padding.

A multiply-add counts as 2. Only matrix products are counted (2 x weights x real tokens, and attention's two products
over the real lengths); softmax, GELU, LayerNorm and heads are not, and neither is anything recomputed. A backward pass
counts twice its forward, so a training step counts 3 times.
"""

from collections.abc import Sequence

TRAINING_FACTOR = 3


def linear_flops(tokens: int, in_features: int, out_features: int) -> int:
    """FLOPs of ``[tokens, in_features] x [out_features, in_features]^T``."""
    return 2 * tokens * in_features * out_features


def attention_flops(lengths: Sequence[int], hidden_size: int) -> int:
    """FLOPs of ``q k^T`` and ``p v`` over all heads, each sequence attending to its own real tokens only."""
    return sum(4 * n * n * hidden_size for n in lengths)


def layer_flops(lengths: Sequence[int], hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of the forward of one encoder layer: query, key, value, output, the two of the FFN, and attention."""
    tokens = sum(lengths)
    weights = 4 * hidden_size * hidden_size + 2 * hidden_size * intermediate_size
    return 2 * tokens * weights + attention_flops(lengths, hidden_size)


def encoder_flops(
    lengths: Sequence[int], hidden_size: int, intermediate_size: int, num_layers: int, training: bool = False
) -> int:
    """FLOPs of the encoder for sequences of these real lengths; three times the forward if ``training``."""
    forward = num_layers * layer_flops(lengths, hidden_size, intermediate_size)
    return forward * TRAINING_FACTOR if training else forward
