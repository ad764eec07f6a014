"""Published configurations by name, and small ones of the same shape for development."""

from copy import deepcopy
from typing import Any

_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

_DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": _FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def _without(*fields: str) -> dict[str, Any]:
    return {key: value for key, value in _DEEPSEEK_V3.items() if key not in fields}


_KIMI_K2 = {
    **_DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
_MOONLIGHT = {
    **_without("quantization_config", "rope_scaling"),
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
_SMALL = {
    **{
        key: value
        for key, value in _DEEPSEEK_V3.items()
        if key not in ("quantization_config", "torch_dtype", "rope_scaling")
    },
    "first_k_dense_replace": 1,
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 96,
    "n_group": 4,
    "n_routed_experts": 16,
    "num_attention_heads": 6,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "topk_group": 2,
    "v_head_dim": 32,
    "vocab_size": 4096,
}
_TINY = {
    **_SMALL,
    "hidden_size": 64,
    "intermediate_size": 128,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3.1": {**_DEEPSEEK_V3, "quantization_config": {**_FP8, "scale_fmt": "ue8m0"}},
    "kimi-k2": _KIMI_K2,
    "moonlight-16b-a3b": _MOONLIGHT,
    "small": _SMALL,
    "tiny": _TINY,
}

# What makes two configurations the same architecture, tensor for tensor.
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "num_attention_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def recognise(config: Any) -> str | None:
    """Name of the preset whose tensors have the same shapes as those of `config`, None if there is none."""
    scale_fmt = _scale_fmt(getattr(config, "quantization_config", None))
    matches = [
        name
        for name, values in PRESETS.items()
        if all(getattr(config, field, None) == values[field] for field in _SHAPE_FIELDS)
    ]
    exact = [name for name in matches if _scale_fmt(PRESETS[name].get("quantization_config")) == scale_fmt]
    return next(iter(exact or matches), None)


def _scale_fmt(quantization_config: Any) -> str | None:
    if isinstance(quantization_config, dict):
        return quantization_config.get("scale_fmt")
    return getattr(quantization_config, "scale_fmt", None)


def preset(name: str, **overrides: Any) -> Any:
    """The configuration called `name`, a `DeepseekV3Config` (a `KimiK2Config` for kimi-k2).

    Args:
        name: one of `PRESETS`: "deepseek-v3" (also R1 and V3-0324), "deepseek-v3.1", "kimi-k2",
            "moonlight-16b-a3b"; "small" and "tiny" for development.
        overrides: fields to change.

    Raises:
        ValueError: no such preset.
    """
    from .configuration_deepseek_v3 import DeepseekV3Config, KimiK2Config

    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    values = {**deepcopy(PRESETS[name]), **overrides}
    cls = KimiK2Config if values.pop("model_type") == "kimi_k2" else DeepseekV3Config
    return cls.from_dict(values)
