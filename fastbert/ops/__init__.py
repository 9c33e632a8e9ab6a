"""The ops: each with a reference in plain PyTorch and faster implementations under the same signature."""

from fastbert.ops.attention import attention
from fastbert.ops.embedding import embedding
from fastbert.ops.ffn import ffn
from fastbert.ops.layernorm import layernorm
from fastbert.ops.linear import linear
from fastbert.ops.mlm_loss import mlm_loss

__all__ = ["attention", "embedding", "ffn", "layernorm", "linear", "mlm_loss"]
