"""LoRA written out: the effective weights of an adapted model as a formula, over a float64 model without PEFT."""

import torch
from peft.tuners.lora import LoraLayer

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.kernels import dequantize_weight
from deepseek_v3.quantization.adapted import from_under_adapters


def float64_twin(model):
    """A plain model in float64 with the weights that `model` (maybe FP8) stands for; every matrix dequantised here."""
    twin = DeepseekV3ForCausalLM(model.config).double().eval()
    twin.set_experts_implementation("eager")
    weights = {n: t.double() for n, t in model.state_dict().items() if not n.endswith("_scale_inv")}
    for name, scale in model.state_dict().items():
        if name.endswith("_scale_inv"):
            name = name.removesuffix("_scale_inv")
            weights[name] = widened(model.state_dict()[name], scale)
    twin.load_state_dict(weights)
    return twin


def widened(codes, scale):
    """Codes [.., N, K] as float64; gate and up, one above the other in a stack, have block grids of their own."""
    if codes.dim() == 2:
        return dequantize_weight(codes, scale, dtype=torch.float32).double()
    parts = 2 if -(-codes.shape[1] // 128) != scale.shape[1] else 1
    halves = zip(codes.chunk(parts, dim=1), scale.chunk(parts, dim=1), strict=True)
    stacks = [torch.stack([widened(*pair) for pair in zip(c, s, strict=True)]) for c, s in halves]
    return torch.cat(stacks, dim=1)


def adapters(model, adapter="default"):
    """name of the adapted weight in the plain model -> (lora_A, lora_B, scaling)."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            path = path.removeprefix("base_model.model.").replace(".base_layer", "")
            name = f"{path}.{getattr(module, 'parameter_name', 'weight')}"
            found[name] = (module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter])
    return found


def change(a, b, scaling, like):
    """What LoRA adds: B A for a matrix; for a stack [E, N, K], A is expert-slowest and B is expert-fastest."""
    if like.dim() == 2:
        return scaling * (b @ a)
    experts = like.shape[0]
    rank = a.shape[0] // experts
    matrices = [
        torch.stack([b[:, r * experts + e] for r in range(rank)], 1) @ a[e * rank : (e + 1) * rank]
        for e in range(experts)
    ]
    return scaling * torch.stack(matrices)


def randomise(model, seed=0, size=0.1):
    """Every adapter away from zero, so that a missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def reference(model, twin, tokens, **kwargs):
    """The float64 output with the adapters' formula in the weights, and the leaves that its gradients go to."""
    weights, leaves = dict(twin.state_dict()), {}
    for name, (a, b, scaling) in adapters(model).items():
        leaves[name] = [t.detach().double().requires_grad_() for t in (a, b)]
        weights[name] = weights[name] + change(*leaves[name], scaling, weights[name])
    return torch.func.functional_call(twin, weights, (tokens,), kwargs), leaves


def relative(value, expected):
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm())


def beside(wrapper, *arguments):
    """Experts under PEFT's wrappers, called as the layer that owns them calls them."""
    experts, factors = from_under_adapters(wrapper)
    return experts(*arguments, factors=factors)
