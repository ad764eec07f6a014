"""FP8 training: all three products of the linears and experts in E4M3, under the plain Trainer."""

from .enable import disable_fp8_training, enable_fp8_training
from .recipe import FP8Recipe

__all__ = ["FP8Recipe", "disable_fp8_training", "enable_fp8_training"]
