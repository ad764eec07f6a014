"""The package's operations: a plain torch reference for each, and a faster back end where one runs.

Importing this needs torch alone and asks neither the device nor the environment anything.
"""

from .dispatch import BackendRow, BackendTable, backends
from .mla import mla_decode
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
    "dequantize_activation",
    "dequantize_weight",
    "mla_decode",
    "quantize_activation",
    "quantize_activation_transposed",
    "quantize_weight",
]
