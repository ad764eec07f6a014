"""`enable_fp8_training` and the way back: modules change their class in place, nothing else of the model does."""

from typing import Any, TypeVar

from torch import nn

from ...modeling_deepseek_v3.attention import DeepseekV3Attention
from ...modeling_deepseek_v3.decoder import DeepseekV3DecoderLayer, DeepseekV3MTPLayer
from ...modeling_deepseek_v3.layers import DeepseekV3MLP, DeepseekV3RMSNorm
from ...modeling_deepseek_v3.moe import DeepseekV3Experts, DeepseekV3MoE
from ...quantization.linear import keeps_fp8
from .attention import FP8TrainingAttention, FP8TrainingDecoderLayer, FP8TrainingMTPLayer
from .experts import FP8TrainingExperts, FP8TrainingMoE
from .linear import FP8TrainingLinear, FP8TrainingMLP
from .norm import FP8TrainingRMSNorm
from .quantise import Statistics
from .recipe import FP8Recipe
from .state import FP8Module, FP8State

Model = TypeVar("Model", bound=nn.Module)

# The linear layers that the report runs in FP8; of a layer's other linears (adapters) none.
LINEARS = {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
LINEARS |= {"gate_proj", "up_proj", "down_proj", "eh_proj"}
PRODUCTS: dict[type, type] = {nn.Linear: FP8TrainingLinear, DeepseekV3Experts: FP8TrainingExperts}
AROUND: dict[type, type] = {
    DeepseekV3MLP: FP8TrainingMLP,
    DeepseekV3MoE: FP8TrainingMoE,
    DeepseekV3Attention: FP8TrainingAttention,
    DeepseekV3DecoderLayer: FP8TrainingDecoderLayer,
    DeepseekV3MTPLayer: FP8TrainingMTPLayer,
}
NORMS: dict[type, type] = {DeepseekV3RMSNorm: FP8TrainingRMSNorm}


def _is_named(name: str) -> bool:
    parts = name.removesuffix(".base_layer").split(".")
    return parts[-1] in LINEARS


def _plan(model: nn.Module, recipe: FP8Recipe) -> list[tuple[nn.Module, type]]:
    """Each module to convert with its new class, products and what is around them."""
    targets = PRODUCTS | AROUND | (NORMS if recipe.recompute_norms else {})
    plan: dict[int, tuple[nn.Module, type]] = {}
    for layer in model.modules():
        if not isinstance(layer, DeepseekV3DecoderLayer):
            continue
        for name, module in layer.named_modules():
            new = targets.get(type(module))
            if new is not None and (type(module) is not nn.Linear or _is_named(name)):
                plan[id(module)] = module, new
    return list(plan.values())


def fp8_modules(model: nn.Module) -> list[FP8Module]:
    """The converted modules of a model or of anything that wraps one."""
    return [module for module in model.modules() if isinstance(module, FP8Module)]


def enable_fp8_training(model: Model, recipe: FP8Recipe | None = None) -> Model:
    """Run forward, input-gradient and weight-gradient products in FP8 while the model trains.

    Converted are the attention's projections, the dense MLPs, the shared and the routed experts, and the same with
    `eh_proj` in the MTP modules. Embedding, head, router, norms and the attention itself stay as they are
    (DeepSeek-V3 report, section 3.3.1). The modules change their class in place: parameters, their names and dtypes
    and the state dict are untouched, the optimizer's master weights are the model's own parameters. In `eval()` the
    model computes with the master weights as if it had never been converted.

    Works under `transformers.Trainer` with float32 parameters (`bf16=True` for what is not FP8) or bfloat16 ones,
    with gradient accumulation and gradient checkpointing. On a GPU before compute capability 8.9 and on the CPU plain
    torch computes the same numbers, slowly.

    Args:
        model: a DeepSeek-V3 model, or what wraps one (PEFT: frozen base weights get no gradient, adapters stay).
        recipe: the choices; `FP8Recipe()` where None.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is in FP8 training already, its weights are FP8 codes, or it has nothing to convert.
    """
    recipe = FP8Recipe() if recipe is None else recipe
    if not isinstance(recipe, FP8Recipe):
        raise ValueError(f"recipe must be an FP8Recipe, got {type(recipe).__name__}")
    if fp8_modules(model):
        raise ValueError(
            "the model is in FP8 training already; disable_fp8_training(model) first to change the recipe"
        )
    if keeps_fp8(model):
        raise ValueError(
            "the model's weights are frozen FP8 codes; load it with quantization_config=FP8Config(keep=False) to train"
        )
    plan = _plan(model, recipe)
    if not any(new in PRODUCTS.values() for _, new in plan):
        raise ValueError(f"{type(model).__name__} has no DeepSeek-V3 layer with linears to run in FP8")
    statistics = Statistics()
    for module, new in plan:
        module.__class__ = new
        module.fp8 = FP8State(recipe, statistics)  # type: ignore[assignment]
    return model


def disable_fp8_training(model: Model) -> Model:
    """Undo `enable_fp8_training`: every module gets its class back.

    Raises:
        ValueError: the model is not in FP8 training.
    """
    modules = fp8_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} is not in FP8 training; there is nothing to disable")
    for module in modules:
        plain: Any = next(base for base in type(module).__bases__ if not issubclass(base, FP8Module))
        module.__class__ = plain
        del module.fp8
    return model
