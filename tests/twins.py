"""Small models of ours, and transformers' own classes with the same weights."""

import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}


def native_config(config):
    """transformers' own configuration of the same model, without MTP."""
    values = {**config.to_dict(), "num_nextn_predict_layers": 0, "num_mtp_layers": 0}
    return NativeConfig.from_dict(values)


def spread_weights(model, seed=0):
    """Weights far enough from zero that a wrong path shows, biases of the routers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.dim() >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.6 / tensor.shape[-1] ** 0.5))
    return model


def make_model(seed=0, **overrides):
    """A tiny causal LM with spread weights, in eval mode."""
    return spread_weights(DeepseekV3ForCausalLM(preset("tiny", **overrides)), seed).eval()


def native_twin(model, **config_overrides):
    """transformers' own causal LM with the weights of `model`."""
    config = native_config(model.config)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    native = NativeForCausalLM(config).eval()
    native.config._attn_implementation = model.config._attn_implementation
    first = model.config.num_hidden_layers
    mtp = tuple(f"model.layers.{first + depth}." for depth in range(model.config.num_nextn_predict_layers))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(mtp or "-")}
    native.load_state_dict(own)
    return native
