"""The package's operations: a plain torch reference for each, and a faster back end where one runs.

Importing this needs torch alone and asks neither the device nor the environment anything.
"""

from .dispatch import BackendRow, BackendTable, backends
from .experts import experts_forward
from .grouped import grouped_gemm, grouped_wgrad
from .mla import mla_decode
from .permute import combine_pairs, gather_pairs, route, sort_pairs
from .quantize import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_activation_transposed,
    quantize_weight,
)

__all__ = [
    "BackendRow",
    "BackendTable",
    "backends",
    "combine_pairs",
    "dequantize_activation",
    "dequantize_weight",
    "experts_forward",
    "gather_pairs",
    "grouped_gemm",
    "grouped_wgrad",
    "mla_decode",
    "quantize_activation",
    "quantize_activation_transposed",
    "quantize_weight",
    "route",
    "sort_pairs",
]
