"""Tokens a second and the share of the machine's peak that a training run makes use of."""

from __future__ import annotations

from typing import Any

from fastbert.flops import TRAINING_FACTOR, encoder_flops, linear_flops


class Work:
    """Useful floating-point operations of training steps, in which padding and anything recomputed do not count.

    Matrix products of the encoder over the real tokens, attention over the real lengths, and the transform and decoder
    of the masked language model at labelled positions only; a backward counts twice its forward.
    """

    def __init__(self, config: Any) -> None:
        self.hidden = config.hidden_size
        self.shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
        self.vocabulary = config.vocab_size

    def of(self, lengths: list[int], labels: int) -> int:
        """FLOPs of forward and backward of sequences of these lengths with as many labels."""
        head = linear_flops(labels, self.hidden, self.hidden) + linear_flops(labels, self.hidden, self.vocabulary)
        return encoder_flops(lengths, *self.shape, training=True) + TRAINING_FACTOR * head
