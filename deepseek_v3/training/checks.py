"""What a run of adapters is checked for: a base that is the one they were trained over, in memory, and of one dtype.

Special about it: a fingerprint must tell two bases of equal shapes apart, and be the same whether one base is held in
FP8, in 4-bit, in BF16 or wider. So it is of the weights that no such form changes: norms, routers, embedding and head.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling_deepseek_v3.layers import DeepseekV3RMSNorm
from ..modeling_deepseek_v3.moe import DeepseekV3TopkRouter
from ..quantization import keeps_fp8

FINGERPRINT_FILE = "base_fingerprint.json"
_ROWS = 64
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_fingerprint(model: nn.Module) -> str:
    """A checksum over norms, routers, and rows of embedding and head, each rounded to BF16.

    Args:
        model: the base, before or under adapters. Weights that lie on the disk or the meta device are passed over.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, module in _named(model):
        own = isinstance(module, DeepseekV3RMSNorm | DeepseekV3TopkRouter | nn.Embedding) or name == "lm_head"
        if own and not hasattr(module, "modules_to_save") and ".modules_to_save." not in name:
            weight: Any = module.weight
            if not weight.is_meta:
                step = max(1, len(weight) // _ROWS)
                rows = weight.detach()[::step].to("cpu", torch.bfloat16).contiguous()
                digest.update(name.encode() + rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_fingerprint(fingerprint: str, folder: str | Path) -> None:
    """Write it beside an adapter, to base_fingerprint.json."""
    Path(folder, FINGERPRINT_FILE).write_text(json.dumps({"sha256": fingerprint}) + "\n", encoding="utf-8")


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Refuse an adapter that was trained over another base, also one of equal shapes.

    Args:
        model: the base that the adapter is to go over.
        folder: of the adapter; one without base_fingerprint.json passes.

    Raises:
        ValueError: the base's fingerprint is another.
    """
    path = Path(folder, FINGERPRINT_FILE)
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["sha256"] != base_fingerprint(model):
        raise ValueError(
            f"the adapter {folder} is of another base: {path.name} is not the fingerprint of this model, although its "
            "shapes may be the same. Take the base that adapter_config.json names"
        )


def check_dtypes(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be multiplied with one another outside of autocast.

    Adapters, routers, and what is quantised bring their own dtypes, and are left out.

    Raises:
        ValueError: two layers' weights differ in their dtype.
    """
    first: tuple[str, torch.dtype] | None = None
    for name, module in _named(model):
        weight: Any = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear | nn.Embedding | DeepseekV3RMSNorm) and weight.dtype in _FLOATS
        if not plain or ".lora_" in name:
            continue
        first = first or (name, weight.dtype)
        if weight.dtype != first[1]:
            raise ValueError(
                f"{name}.weight is {weight.dtype} and {first[0]}.weight is {first[1]}: their products do not mix. "
                f"Call model.to({first[1]}) before adding adapters, or train under autocast "
                "(TrainingArguments(bf16=True))"
            )


def check_sharding(model: nn.Module, args: Any) -> None:
    """Refuse FSDP's mixed precision over FP8 codes, which it would cast like any other parameter.

    Args:
        model: the model, before or under FSDP.
        args: the `TrainingArguments`.

    Raises:
        ValueError: both at once.
    """
    if args.fsdp and (args.bf16 or args.fp16) and keeps_fp8(model):
        raise ValueError(
            "FSDP's mixed precision (bf16 or fp16 in TrainingArguments) would cast the FP8 codes. Leave it out and "
            "load the base with dtype=torch.bfloat16"
        )


def check_in_memory(model: nn.Module) -> None:
    """Refuse to train what accelerate reads from the disk or from offloaded memory, layer by layer.

    Raises:
        ValueError: a weight that is not there.
    """
    missing = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if missing is not None:
        raise ValueError(
            f"{missing} is offloaded, and gradients need the weights in place. Load without offloading: in FP8 or "
            "4-bit on one device, or sharded over several (FSDP2, DeepSpeed ZeRO-3)"
        )


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by their names in a model without adapters."""
    wrappers = ("base_model.model.", ".base_layer", ".original_module")
    found = []
    for name, module in model.named_modules():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        found.append((name, module))
    return found
