"""The checks behind `DeepseekV3Config`: each names the field, its value and what to do."""

from typing import Any

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
_NOT_NEGATIVE = (
    "num_nextn_predict_layers",
    "n_shared_experts",
    "first_k_dense_replace",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    "mtp_loss_weight",
    "seq_balance_loss_alpha",
    "router_bias_update_rate",
)


def _refuse(field: str, value: Any, why: str, remedy: str) -> None:
    raise ValueError(f"config.{field} = {value!r}: {why}. {remedy}")


def _check_sizes(config: Any) -> None:
    for field in _POSITIVE:
        if getattr(config, field) < 1:
            _refuse(field, getattr(config, field), "must be at least 1", "Set a positive integer")
    for field in _NOT_NEGATIVE:
        if getattr(config, field) < 0:
            _refuse(field, getattr(config, field), "must not be negative", "Set 0 to switch it off")
    if config.q_lora_rank is not None and config.q_lora_rank < 1:
        _refuse("q_lora_rank", config.q_lora_rank, "must be at least 1", "Set null for a plain q_proj")
    if config.num_key_value_heads != config.num_attention_heads:
        _refuse(
            "num_key_value_heads",
            config.num_key_value_heads,
            f"latent attention has one key a query head, and num_attention_heads is {config.num_attention_heads}",
            "Set the two equal",
        )
    if config.attention_dropout >= 1:
        _refuse("attention_dropout", config.attention_dropout, "is a probability", "Set a value in [0, 1)")


def _check_routing(config: Any) -> None:
    experts, groups, chosen = config.n_routed_experts, config.n_group, config.topk_group
    if experts % groups:
        _refuse("n_routed_experts", experts, f"is not divisible by n_group = {groups}", "Change one of the two")
    if chosen > groups:
        _refuse("topk_group", chosen, f"exceeds n_group = {groups}", "Choose at most n_group groups")
    per_group = experts // groups
    if config.num_experts_per_tok > chosen * per_group:
        _refuse(
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"exceeds the {chosen * per_group} experts of topk_group = {chosen} groups of {per_group}",
            "Raise topk_group or lower num_experts_per_tok",
        )
    if groups > 1 and per_group < 2:
        _refuse("n_group", groups, "leaves fewer than 2 experts a group, and a group's score is its top 2", "Lower it")
    if config.scoring_func != "sigmoid":
        _refuse("scoring_func", config.scoring_func, "is not a DeepSeek-V3 router", "Only 'sigmoid' is supported")
    if config.topk_method != "noaux_tc":
        _refuse("topk_method", config.topk_method, "is not a DeepSeek-V3 router", "Only 'noaux_tc' is supported")


def _check_rope(config: Any, rope_types: tuple[str, ...]) -> None:
    if config.qk_rope_head_dim % 2:
        _refuse("qk_rope_head_dim", config.qk_rope_head_dim, "is odd, and RoPE rotates pairs", "Set an even number")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in rope_types:
        _refuse(
            "rope_scaling['type']", rope_type, "is no RoPE type that transformers knows", f"Use one of {rope_types}"
        )
    theta = rope.get("rope_theta")
    if theta is not None and theta <= 0:
        _refuse("rope_theta", theta, "must be positive", "DeepSeek-V3 uses 10000")
    if rope_type != "yarn":
        return
    for field in ("factor", "original_max_position_embeddings"):
        value = rope.get(field)
        if not isinstance(value, int | float) or value < 1:
            _refuse(f"rope_scaling['{field}']", value, "YaRN needs a number of at least 1", "DeepSeek-V3: 40 and 4096")


def check(config: Any, rope_types: tuple[str, ...]) -> None:
    """Raise ValueError for the first inconsistency in `config`.

    Args:
        config: a `DeepseekV3Config` whose defaults are filled in.
        rope_types: the RoPE types that the installed transformers can initialise.
    """
    _check_sizes(config)
    _check_routing(config)
    _check_rope(config, rope_types)
