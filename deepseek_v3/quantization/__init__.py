"""FP8 weights of official checkpoints inside the models: read, kept or dequantised, and written.

Imports `configuration` and `kernels`, never the models: they are handed in.
"""

from .bnb_config import bnb_arguments
from .bnb_experts import BnbExperts, stack_shapes
from .config import FP8Config, is_fp8, requested_config, requesting
from .experts import FP8Experts
from .fitting import check_folder
from .linear import FP8Linear, keeps_fp8
from .loading import load_streamed
from .merging import RoundingReport
from .official_names import fuse_official_names
from .quantizer import DeepseekFP8Quantizer, dequantized_state_dict, register, unregister
from .saving import Weights, save_official, streams

__all__ = [
    "BnbExperts",
    "DeepseekFP8Quantizer",
    "FP8Config",
    "FP8Experts",
    "FP8Linear",
    "RoundingReport",
    "Weights",
    "bnb_arguments",
    "check_folder",
    "dequantized_state_dict",
    "fuse_official_names",
    "is_fp8",
    "keeps_fp8",
    "load_streamed",
    "register",
    "requested_config",
    "requesting",
    "save_official",
    "stack_shapes",
    "streams",
    "unregister",
]
