"""DeepSeek's inference layout: each official name's name there, and the dimension that is cut for the ranks.

Routed experts are not cut: rank i of n holds experts i*E/n to (i+1)*E/n, under their global numbers. Scales are cut
like their weights. Source: the published inference/convert.py, whose renaming works on the last but one part of a
name.
"""

from typing import Any, NamedTuple

from .errors import CheckpointError

# Last but one part of the official name -> (name there, dimension cut or None for a copy on each rank).
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
    # The MTP layer, which DeepSeek's own script leaves out.
    "head": ("head", 0),
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
    "eh_proj": ("eh_proj", None),
}
_PARTS = {"self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}


class Placement(NamedTuple):
    """Where an official tensor goes.

    Attributes:
        name: its name in the rank files.
        axis: the dimension cut into equal parts for the ranks, None where it is not cut.
        expert: the routed expert that it belongs to, None for everything else.
    """

    name: str
    axis: int | None
    expert: int | None


def placement(official: str) -> Placement:
    """The place of an official tensor in the inference layout.

    Raises:
        CheckpointError: DeepSeek's inference model has no such tensor.
    """
    parts = official.removeprefix("model.").split(".")
    module = parts[-2] if len(parts) > 1 else ""
    if module not in _MODULES or (parts[-1] == "bias"):
        raise CheckpointError("DeepSeek's inference layout has no place for it", tensor=official)
    new, axis = _MODULES[module]
    expert = int(parts[parts.index("experts") + 1]) if "experts" in parts else None
    renamed = [_PARTS.get(part, part) for part in parts]
    renamed[-2] = new
    return Placement(".".join(renamed), None if expert is not None else axis, expert)


def expert_range(config: Any, rank: int, ranks: int) -> range:
    """The routed experts of one rank."""
    share = config.n_routed_experts // ranks
    return range(rank * share, (rank + 1) * share)
