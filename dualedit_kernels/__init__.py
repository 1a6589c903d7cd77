"""Operators for editing vision-language models: nearest-key routing, gated edit attention, routed linear.

Every function is differentiable where it can be, works under ``torch.compile``, runs on any device PyTorch
runs on, and promises that a row routed to -1 ("no edit") leaves unchanged bit for bit.
Which implementation runs, and why: ``python -m dualedit_kernels``.
"""

from .gated_edit_attention.arguments import AttentionWeights, Slots
from .gated_edit_attention.op import Gate, decides_gate, fold_query, gated_edit_attention, look_up
from .nearest_key.codes import KeyCodes, encode_keys
from .nearest_key.op import codes_pay, nearest_key
from .routed_linear.op import Full, LowRank, routed_linear

__version__ = "0.1.0"

__all__ = [
    "AttentionWeights",
    "Full",
    "Gate",
    "KeyCodes",
    "LowRank",
    "Slots",
    "codes_pay",
    "decides_gate",
    "encode_keys",
    "fold_query",
    "gated_edit_attention",
    "look_up",
    "nearest_key",
    "routed_linear",
]
