"""What bitsandbytes makes of a folder's weights, by its own functions, one by one: the oracle of packed models."""

import torch
from bitsandbytes import functional
from official import stored
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_v3 import DeepseekV3ForCausalLM
from twins import make_model

PLAIN = ("embed_tokens", "lm_head", "shared_head", "norm", "mlp.gate.", "eh_proj")
# A height that is no multiple of 32, experts of 40 x 64 and 64 x 20 numbers, of which 64 does not divide every one.
ODD = {"moe_intermediate_size": 20, "hidden_size": 52, "q_lora_rank": 24, "kv_lora_rank": 20, "v_head_dim": 12}


def four_bit(compute=torch.float32, **kwargs):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **kwargs}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **options)


EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)


def write_bf16(folder, **overrides):
    """A model in BF16 with MTP, under the official names."""
    make_model(**overrides).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, config=None, **kwargs):
    options = {"dtype": torch.float32, **({"quantization_config": config} if config else {}), **kwargs}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def is_plain(name):
    return any(part in name for part in PLAIN)


def widened(codes, state):
    """What packed codes [.., 1] stand for as float64, by the definition: one maximum for 64 numbers, end to end."""
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = codes.flatten().int()
    numbers = functional.get_4bit_type(state.quant_type, device="cpu").double()[
        torch.stack([codes >> 4, codes & 15], 1).flatten()
    ]
    return (numbers * absmax.double().repeat_interleave(64)[: len(numbers)])[: state.shape.numel()].view(state.shape)


def round_trip(matrix, config):
    """A matrix as it is after packing; 8-bit by the definition."""
    if config.load_in_8bit:
        absmax = matrix.abs().amax(dim=1, keepdim=True)
        return (matrix * (127 / absmax)).round().double() * absmax.double() / 127
    options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
    return widened(*functional.quantize_4bit(matrix, **options))


def twin_of(folder, config, dtype=torch.float64):
    """A plain model with the weights that a packed one stands for. Experts are packed gate above up."""
    # As they are cast before they are packed.
    tensors = {name: tensor.float() for name, tensor in stored(folder).items()}
    weights = dict(tensors)
    for name, tensor in tensors.items():
        if is_plain(name) or tensor.dim() < 2:
            continue
        if ".experts." not in name:
            if config.load_in_8bit or tensor.shape[1] % 64 == 0:
                weights[name] = round_trip(tensor, config)
        elif "down_proj" in name:
            weights[name] = round_trip(tensor, config)
        elif "gate_proj" in name:
            other = name.replace("gate_proj", "up_proj")
            both = round_trip(torch.cat([tensor, tensors[other]]), config)
            weights[name], weights[other] = both.chunk(2)
    twin = DeepseekV3ForCausalLM(AutoConfig.from_pretrained(folder)).to(dtype).eval()
    twin.set_experts_implementation("eager")
    missing = twin.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=False)
    assert not missing.missing_keys
    return twin


def dense(stacks, x, index, weights):
    """The experts' sum of `DeepseekV3Experts`, token by token in float64, from whole matrices."""
    result = torch.zeros(len(x), stacks["down_proj"].shape[1], dtype=torch.float64, device=x.device)
    for slot in range(index.shape[1]):
        chosen = index[:, slot]
        gate, up = torch.einsum("tk,tnk->tn", x, stacks["gate_up_proj"][chosen]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        result = result + weights[:, slot, None] * torch.einsum("tk,tnk->tn", inner, stacks["down_proj"][chosen])
    return result
