"""The operations: one file each, with its mathematics, its reference in PyTorch, its operator and its public
function."""

from albert_fast.ops.attention import attention, cross_attention
from albert_fast.ops.bias_gelu import bias_gelu
from albert_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from albert_fast.ops.embed_layer_norm import embed_layer_norm
from albert_fast.ops.encoder import encoder
from albert_fast.ops.masked_lm_loss import MaskedLMStatistics, masked_lm_loss, masked_lm_loss_with_statistics

__all__ = [
    "MaskedLMStatistics",
    "attention",
    "bias_gelu",
    "cross_attention",
    "dropout_add_layer_norm",
    "embed_layer_norm",
    "encoder",
    "masked_lm_loss",
    "masked_lm_loss_with_statistics",
]
