"""`FP8Recipe`: which numbers FP8 training uses and what it keeps for the backward."""

from dataclasses import dataclass

import torch

CHOICES = {
    "scale_fmt": (None, "ue8m0"),
    "wgrad_dtype": ("float32", "bfloat16"),
    "swiglu_inputs": ("fp8", "input_dtype"),
    "attention_output": ("input_dtype", "e5m6"),
}


@dataclass(frozen=True)
class FP8Recipe:
    """The choices of FP8 training (DeepSeek-V3 report, sections 3.2.3 and 3.3). Every FP8 tensor is E4M3 with scales
    of its current values: 1 x 128 for activations and their gradients, 128 x 128 for weights, 128 x 1 for weight
    gradients. Block-wise (128 x 128) input gradients, which made the report's runs diverge, are not offered.

    Bytes below are for one token; D hidden_size, F the width of an MLP or of a token's experts together, H heads,
    V v_head_dim.

    Attributes:
        scale_fmt: None, float32 scales: the whole range of E4M3 is used. "ue8m0", scales rounded up to powers of two:
            re-tiling kept codes then changes exponents alone, at the cost of up to half the range.
        wgrad_dtype: of the weight-gradient products. "float32" adds micro-batches up without rounding, where the
            parameters are float32; a gradient has its parameter's dtype, so bfloat16 parameters get bfloat16.
            "bfloat16" halves what the product writes.
        swiglu_inputs: "fp8" keeps SwiGLU's two inputs as codes, 2 F bytes, and computes its output again;
            "input_dtype" keeps them as they are (4 F bytes in bfloat16), without the 2 to 3 % that rounding adds to
            the gradients of gate and up.
        attention_output: of the input of `o_proj`, which the attention's backward reads too. "e5m6" packs it in 12
            bits under power-of-two scales: 1.5 H V bytes instead of 2 H V, a rounding of at most 2^-7 of a value,
            and one packing and unpacking; where the attention keeps no output (eager), nothing is packed.
            "input_dtype" keeps it exactly, and `o_proj`'s codes beside it (H V bytes).
        recompute_norms: keep an RMSNorm's input alone (2 D bytes instead of about 10 D) and compute it again.
        recompute_up_projections: compute queries, keys and values again from the latents instead of keeping H * (2 *
            qk_head_dim + V) numbers, as the report did; costs the products of `q_b_proj` and `kv_b_proj` once more.
            On an H200 a layer of DeepSeek-V3's size then keeps 0.25 (dense) and 0.21 (MoE) of what BF16 keeps instead
            of 0.54 and 0.40, and takes 2 to 3 % longer. Does nothing where gradient checkpointing computes the whole
            layer again.
        statistics_interval: optimizer steps between two counts of what E4M3 loses (`FP8StatisticsCallback`);
            0 never. On an H200 a layer's step that counts takes 1.5 to 1.9 times as long; every 100 steps that is
            under 1 %.

    Raises:
        ValueError: a value that is not one of these.
    """

    scale_fmt: str | None = None
    wgrad_dtype: str = "float32"
    swiglu_inputs: str = "fp8"
    attention_output: str = "e5m6"
    recompute_norms: bool = True
    recompute_up_projections: bool = False
    statistics_interval: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"FP8Recipe: {name} = {getattr(self, name)!r}, choose from {choices}")
        for name in ("recompute_norms", "recompute_up_projections"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"FP8Recipe: {name} = {getattr(self, name)!r}, choose True or False")
        interval = self.statistics_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
            raise ValueError(f"FP8Recipe: statistics_interval = {interval!r}, give a number of steps, 0 for never")

    def gradient_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """What the weight-gradient product of `parameter` writes."""
        if self.wgrad_dtype == "float32" and parameter.dtype == torch.float32:
            return torch.float32
        return torch.float16 if parameter.dtype == torch.float16 else torch.bfloat16
