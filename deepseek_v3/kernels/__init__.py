"""The package's operations: a plain torch reference for each, and a faster back end where one runs.

Importing this needs torch alone and asks neither the device nor the environment anything.
"""

from .dispatch import BackendRow, BackendTable, backends
from .e5m6 import pack_e5m6, unpack_e5m6
from .experts import experts_forward, experts_step, is_silu, is_step
from .four_bit import widen_4bit
from .fp8 import fp8_gemm
from .fp8_training import (
    quantize_both,
    retile,
    swiglu_backward,
    swiglu_backward_codes,
    swiglu_forward_codes,
)
from .grouped import grouped_gemm, grouped_wgrad
from .grouped_fp8 import grouped_fp8_gemm, grouped_fp8_wgrad, quantize_grouped_transposed
from .heads import join_keys, rotate_queries, rotate_queries_
from .mla import mla_decode
from .norm import rms_norm, rotate, write_latents
from .norm_training import joined_rms_norm
from .permute import combine_pairs, gather_pairs, route, sort_pairs
from .quantize import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_activation_transposed,
    quantize_swiglu,
    quantize_weight,
    transpose_codes,
)
from .single import AttentionWeights, Norm, Router, SingleAttention, SingleExperts, SingleMLP, is_single
from .step import absorb_outputs, absorb_queries, norm_and_write, rope_angles
from .swiglu import swiglu
from .tuning import autotune

__all__ = [
    "absorb_outputs",
    "absorb_queries",
    "AttentionWeights",
    "autotune",
    "BackendRow",
    "BackendTable",
    "backends",
    "combine_pairs",
    "dequantize_activation",
    "dequantize_weight",
    "experts_forward",
    "experts_step",
    "fp8_gemm",
    "gather_pairs",
    "grouped_fp8_gemm",
    "grouped_fp8_wgrad",
    "grouped_gemm",
    "grouped_wgrad",
    "is_silu",
    "is_single",
    "is_step",
    "join_keys",
    "joined_rms_norm",
    "mla_decode",
    "Norm",
    "norm_and_write",
    "pack_e5m6",
    "quantize_activation",
    "quantize_activation_transposed",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_swiglu",
    "quantize_weight",
    "retile",
    "rms_norm",
    "rope_angles",
    "rotate",
    "rotate_queries",
    "rotate_queries_",
    "route",
    "Router",
    "SingleAttention",
    "SingleExperts",
    "SingleMLP",
    "sort_pairs",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_codes",
    "swiglu_forward_codes",
    "unpack_e5m6",
    "transpose_codes",
    "widen_4bit",
    "write_latents",
]
