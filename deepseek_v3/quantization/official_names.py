"""Official per-expert names in `load_state_dict`, for fused experts with or without scales.

Letters: E routed experts, F expert width.
"""

import re
from typing import Any

import torch

_PARTS = ("gate_proj", "up_proj", "down_proj")


def fuse_official_names(experts: Any, state_dict: dict, prefix: str, missing: list[str], errors: list[str]) -> None:
    """Turn `{e}.gate_proj.weight`, `{e}.up_proj.weight`, `{e}.down_proj.weight` below `prefix`, and their
    `weight_scale_inv` where the module has scales, into the fused names.

    Without this, `load_state_dict` of a saved folder finds no experts and leaves them as they are. A shard may hold
    some experts only: these rows are replaced, the others keep their value and are reported in `missing`, so that
    shards can be loaded one after another.
    """
    pattern = re.compile(re.escape(prefix) + rf"(\d+)\.({'|'.join(_PARTS)})\.weight(_scale_inv)?")
    found = {key: match for key in state_dict if (match := pattern.fullmatch(key))}
    if not found:
        return
    fused: dict[str, torch.Tensor] = {}
    for key, match in found.items():
        expert, name, suffix = int(match[1]), match[2], match[3] or ""
        target = ("down_proj" if name == "down_proj" else "gate_up_proj") + suffix
        parameter = getattr(experts, target, None)
        if expert >= experts.num_experts or parameter is None:
            continue  # left in place: load_state_dict reports it as unexpected
        tensor = state_dict.pop(key)
        if target not in fused:
            fused[target] = (
                torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach().clone()
            )
        place = fused[target][expert]
        if name != "down_proj":
            place = place.chunk(2)[name == "up_proj"]
        if place.shape != tensor.shape:
            errors.append(
                f"size mismatch for {key}: {tuple(tensor.shape)} in the file, {tuple(place.shape)} in the model"
            )
        elif (place.dtype == torch.float8_e4m3fn) != (tensor.dtype == torch.float8_e4m3fn):
            errors.append(f"{key} is {tensor.dtype} in the file, {place.dtype} in the model: one of them is quantised")
        else:
            place.copy_(tensor)
    suffixes = ("", "_scale_inv") if hasattr(experts, "down_proj_scale_inv") else ("",)
    names = (f"{prefix}{e}.{p}.weight{s}" for e in range(experts.num_experts) for p in _PARTS for s in suffixes)
    missing.extend(name for name in names if name not in found)
    for target, value in fused.items():
        state_dict[prefix + target] = value
