"""A model's weights in the official FP8 layout, one tensor after another, for `save_pretrained(quantize="fp8")`.

Special about it: codes that are there already (kept FP8, or the file that a model was fine-tuned from, where a weight
still is what that file dequantises to) are written back bit for bit; every other matrix is quantised once, and what
the rounding did to the change is measured.

Letters: E routed experts, F expert width.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..configuration.layout import official_tensors
from ..kernels import dequantize_weight, quantize_weight
from .stored import FP8, SCALE_SUFFIX, CheckpointTensors, read_scale

logger = logging.get_logger(__name__)

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")


def are_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether every scale can be written in ue8m0 without rounding."""
    return bool((torch.frexp(scale.float())[0] == 0.5).all())


def quantized_state_dict(
    state_dict: dict[str, torch.Tensor],
    config: Any,
    *,
    scale_fmt: str | None = None,
    fetch: Callable[[str], torch.Tensor],
    tied: Any = (),
    original: str | None = None,
) -> dict[str, torch.Tensor]:
    """Official names to tensors on the CPU: E4M3 codes, float32 scales, the rest BF16, router biases float32.

    Args:
        state_dict: the model's own, experts fused, MTP modules' copies of embedding and head included.
        config: the model's, which says what the official files hold.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.
        fetch: gives an offloaded tensor by name.
        tied: names that another name stores.
        original: a folder with the FP8 checkpoint that the model was fine-tuned from, or None.

    Raises:
        ValueError: weights that are not finite; kept codes whose scales `scale_fmt` cannot hold.
    """
    kinds = {spec.name: spec.kind for spec in official_tensors(config, quantized=True)}
    untouched = _Original(original, scale_fmt) if original is not None else None
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if name in tied:
            continue
        tensor = fetch(name) if tensor.device.type == "meta" else tensor
        for official, part in _split(name, tensor.detach()):
            # A base model's names lack the prefix.
            known = official if official in kinds else f"model.{official}"
            kind = kinds.get(known)
            if part.dtype == FP8 or kind == "scale":
                result[official] = _kept(official, part, scale_fmt)
            elif kind == "fp8":
                pair = untouched.codes(known, part) if untouched else _quantize(official, part, scale_fmt)
                result[official], result[official + SCALE_SUFFIX] = pair
            else:
                dtype = {"bf16": torch.bfloat16, "f32": torch.float32}.get(kind or "", part.dtype)
                result[official] = part.to("cpu", dtype)
    if untouched:
        untouched.report()
    return result


def _split(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The official tensors that a parameter holds."""
    match = _FUSED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    prefix, which, suffix = match[1], match[2], match[3] or ""
    for expert, matrix in enumerate(tensor):
        names = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
            yield f"{prefix}.{expert}.{part}.weight{suffix}", rows


def _kept(name: str, tensor: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    if scale_fmt is not None and tensor.dtype != FP8 and not are_powers_of_two(tensor):
        raise ValueError(
            f"{name}: the codes kept in memory have scales that are no powers of two, and {scale_fmt} would round "
            "them. Save with scale_fmt=None, or load with FP8Config(keep=False) to quantise anew"
        )
    return tensor.cpu().contiguous()


def _quantize(name: str, tensor: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_weight(tensor, scale_fmt=scale_fmt)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity; nothing was written. Train again from an earlier checkpoint")
    return codes.cpu(), scale.cpu()


class _Original:
    """The checkpoint that a model came from, to tell which weights training left alone."""

    def __init__(self, folder: str, scale_fmt: str | None) -> None:
        self.tensors = CheckpointTensors(checkpoint_files(folder))
        self.names = self.tensors.fp8_weights()
        self.scale_fmt = scale_fmt
        self.equal = 0
        # Of each weight that was touched: how much of its change the rounding took, as a share of the change.
        self.lost: dict[str, float] = {}

    def codes(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.names:
            return _quantize(name, weight, self.scale_fmt)
        codes, scale = self.tensors.read(name), read_scale(self.tensors, name + SCALE_SUFFIX)
        weight = weight.cpu()
        before = dequantize_weight(codes, scale, dtype=weight.dtype)
        fits = self.scale_fmt is None or are_powers_of_two(scale)
        if torch.equal(before, weight) and fits:
            self.equal += 1
            return codes, scale
        pair = _quantize(name, weight, self.scale_fmt)
        change = weight.float() - before.float()
        if bool(change.any()):
            after = dequantize_weight(*pair, dtype=torch.float32) - before.float()
            self.lost[name] = float((after - change).norm() / change.norm())
        return pair

    def report(self) -> None:
        self.tensors.close()
        if not self.lost:
            logger.warning(f"{self.equal} FP8 weights are those of the original checkpoint; none was changed.")
            return
        shares = sorted(self.lost.values())
        logger.warning(
            f"{self.equal} FP8 weights are those of the original checkpoint, {len(shares)} were changed and quantised "
            f"again: rounding moved them by {shares[len(shares) // 2]:.2f} (median) to {shares[-1]:.2f} (largest) "
            "times the size of their change."
        )
        drowned = [name for name, share in self.lost.items() if share > 0.5]
        if drowned:
            logger.warning(
                f"In {len(drowned)} of them most of the change drowns in the rounding, {drowned[0]} among them. Save "
                "the model in BF16, or keep the adapter beside the original weights."
            )


def checkpoint_files(folder: str) -> list[str]:
    """The safetensors files of a checkpoint's folder, by its index where there is one.

    Raises:
        FileNotFoundError: there is none.
    """
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    names = [SAFE_WEIGHTS_NAME]
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            names = sorted({os.path.basename(name) for name in json.load(file)["weight_map"].values()})
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing; give the folder of the FP8 checkpoint as `original`")
    return paths
