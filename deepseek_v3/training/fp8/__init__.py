"""FP8 training: all three products of the linears and experts in E4M3, under the plain Trainer."""

from .callback import FP8StatisticsCallback
from .enable import disable_fp8_training, enable_fp8_training
from .optimizer import AdamWBF16
from .recipe import FP8Recipe

__all__ = ["AdamWBF16", "FP8Recipe", "FP8StatisticsCallback", "disable_fp8_training", "enable_fp8_training"]
