"""Which weights a LoRA adapts, in the words of `peft.LoraConfig`.

Special about it: PEFT rewrites `gate_proj`, `up_proj` and `down_proj` among the target modules of this architecture to
the fused experts, so that the dense and the shared MLPs can be named as parameters only. The router is never named: an
adapter there would move what the experts were balanced for.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..configuration.layout import is_moe_layer

PRESETS = ("attention", "all", "experts")
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_MLP = ("gate_proj", "up_proj", "down_proj")


def lora_target_modules(config: Any, preset: str = "attention") -> dict[str, Any]:
    """Targets for a plain `peft.LoraConfig`: `LoraConfig(r=16, **lora_target_modules(model.config, "all"))`.

    MTP modules are adapted with the layers. Where `target_parameters` is not empty, PEFT allows neither dropout nor
    DoRA. Merging into FP8 codes or packed experts is refused: call `model.dequantize()` first. Over a 4-bit or 8-bit
    base PEFT takes no second adapter with "all": for several, join "attention" and "experts".

    Args:
        config: of the model.
        preset: "attention": every projection of the latent attention. "experts": the routed experts. "all": both, the
            dense and the shared MLPs, and the projection that MTP modules join their inputs with.

    Returns:
        `target_modules` and `target_parameters`; a list is empty where there is nothing of the kind.

    Raises:
        ValueError: an unknown preset; "experts" for a model that has none.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: choose {', '.join(map(repr, PRESETS[:-1]))} or {PRESETS[-1]!r}")
    query = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    attention = [*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    if preset == "attention":
        return {"target_modules": attention, "target_parameters": []}
    moe = [is_moe_layer(config, layer) for layer in range(_layers(config))]
    if preset == "experts":
        if not any(moe):
            raise ValueError(
                f"preset='experts': the model has no routed experts, its {len(moe)} layers are dense "
                f"(first_k_dense_replace = {config.first_k_dense_replace}). Choose 'attention' or 'all'"
            )
        return {"target_modules": [], "target_parameters": list(_EXPERTS)}
    owners = ["mlp"] if not all(moe) else []
    owners += ["mlp.shared_experts"] if any(moe) and config.n_shared_experts else []
    parameters = [f"{owner}.{name}.weight" for owner in owners for name in _MLP]
    parameters += _EXPERTS if any(moe) else []
    joins = ["eh_proj"] if config.num_nextn_predict_layers else []
    return {"target_modules": attention + joins, "target_parameters": parameters}


def named_targets(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """What names of weights' ends mean, as `lora_target_modules` gives it.

    Args:
        model: the base.
        names: ends of names of linear layers or of the experts' parameters, such as "o_proj", "shared_experts.up_proj"
            or "experts.down_proj".

    Raises:
        ValueError: a name that matches nothing, or the router.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    experts = [name for name, _ in model.named_parameters() if name.endswith(tuple(_EXPERTS))]
    targets: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for name in names:
        matches = [[known for known in kind if f".{known}".endswith(f".{name}")] for kind in (linears, experts)]
        if not any(matches):
            known = sorted({known.rpartition(".")[2] for known in linears} | set(_EXPERTS))
            raise ValueError(
                f"the target {name!r} matches no linear layer and no experts. Choose among {', '.join(known)}, or a "
                f"preset: {', '.join(PRESETS)}"
            )
        plain = name.rpartition(".")[2] not in _MLP
        targets["target_modules"] += [name] if matches[0] and plain else []
        targets["target_parameters"] += [f"{name}.weight"] if matches[0] and not plain else []
        targets["target_parameters"] += [name] if matches[1] else []
    return targets


def _layers(config: Any) -> int:
    return config.num_hidden_layers + (config.num_nextn_predict_layers or 0)
