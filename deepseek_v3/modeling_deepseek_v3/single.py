"""The step of a decoder layer for a single token: kernels' objects made of its modules' weights.

Special about it: modules are read instead of called, which holds only while nothing wraps, hooks, moves or replaces
them. That is looked at before every step, cheaply; what the objects hold is looked at when they are made.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import AttentionWeights, Norm, SingleAttention, SingleExperts, SingleMLP, is_silu
from .attention import DeepseekV3Attention
from .layers import DeepseekV3MLP, DeepseekV3RMSNorm, is_bare
from .moe import DeepseekV3Experts, DeepseekV3MoE, DeepseekV3TopkRouter

_HAS_FORWARD = operator.methodcaller("__contains__", "forward")  # accelerate puts its own into a module's dictionary


class Part(NamedTuple):
    """A module in its place: the parent's modules, the name there, and what it must be."""

    places: dict[str, nn.Module | None]
    name: str
    kind: type


class Lent:
    """Modules that are read as their weights, and whether they still may be."""

    def __init__(self, parts: list[Part]) -> None:
        modules: list[Any] = [places[name] for places, name, _ in parts]
        self._places, self._modules = [(places, name) for places, name, _ in parts], modules
        self._kinds, self._owns = [part.kind for part in parts], [module.__dict__ for module in modules]
        self._hooks = [own[name] for own in self._owns for name in ("_forward_hooks", "_forward_pre_hooks")]
        stores = [store for module in modules for store in (module._parameters, module._buffers)]
        self._stores = [(store, name) for store in stores for name, x in store.items() if x is not None]
        self._weights = [store[name] for store, name in self._stores]
        self._addresses = [x.data_ptr() for x in self._weights]

    @classmethod
    def of(cls, parts: list[Part], dtype: torch.dtype) -> "Lent | None":
        """Of modules that are bare, without biases and of one dtype; None else."""
        for places, name, kind in parts:
            module: Any = places.get(name)
            if module is None or not is_bare(module, kind) or getattr(module, "bias", None) is not None:
                return None
            if any(weight is not None and weight.dtype != dtype for weight in module._parameters.values()):
                return None
        return cls(parts)

    def stands(self) -> bool:
        """Whether every module is still itself and bare, and every weight still where it was. Asked twice a layer at
        every step: nothing here loops in Python over more than it must."""
        if any(self._hooks) or any(map(_HAS_FORWARD, self._owns)) or list(map(type, self._modules)) != self._kinds:
            return False
        modules = [places.get(name) for places, name in self._places]
        weights = [store.get(name) for store, name in self._stores]
        same = all(map(operator.is_, modules, self._modules)) and all(map(operator.is_, weights, self._weights))
        return same and [x.data_ptr() for x in self._weights] == self._addresses


class Steps:
    """A layer's objects, made when they are first asked for and again when a module or a weight is another.

    They are no part of the layer's state: a copy of it makes its own.
    """

    def __init__(self) -> None:
        self._attention: tuple[Lent, SingleAttention] | None = None
        self._mlp: tuple[Lent, SingleMLP | SingleExperts] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return Steps, ()

    def attention(self, layer: nn.Module, dtype: torch.dtype) -> SingleAttention | None:
        """`token + self_attn(input_layernorm(token))`; None where the modules must be called."""
        kept = self._attention
        if kept is not None and kept[1].dtype == dtype and kept[0].stands():
            return kept[1]
        self._attention = None
        attention: Any = layer.self_attn
        if type(attention) is not DeepseekV3Attention:
            return None
        own = attention._modules
        low = "q_a_proj" in own
        names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *(["q_a_proj", "q_b_proj"] if low else ["q_proj"])]
        norms = ["kv_a_layernorm", *(["q_a_layernorm"] if low else [])]
        parts = [Part(layer._modules, "self_attn", DeepseekV3Attention)]
        parts += [Part(layer._modules, "input_layernorm", DeepseekV3RMSNorm)]
        parts += [Part(own, name, nn.Linear) for name in names]
        parts += [Part(own, name, DeepseekV3RMSNorm) for name in norms]
        lent = Lent.of(parts, dtype)
        if lent is None:
            return None
        weights = AttentionWeights(
            _norm(layer.input_layernorm),
            attention.q_a_proj.weight if low else None,
            _norm(attention.q_a_layernorm) if low else None,
            attention.kv_a_proj_with_mqa.weight,
            _norm(attention.kv_a_layernorm),
            (attention.q_b_proj if low else attention.q_proj).weight,
            attention.kv_b_proj.weight,
            attention.o_proj.weight,
        )
        options: Any = {"softmax_scale": attention.scaling, "interleave": attention.config.rope_interleave}
        made = SingleAttention(weights, attention.num_heads, **options)
        self._attention = lent, made
        return made

    def mlp(self, layer: nn.Module, dtype: torch.dtype) -> SingleMLP | SingleExperts | None:
        """`token + mlp(post_attention_layernorm(token))`; None where the modules must be called."""
        kept = self._mlp
        if kept is not None and kept[1].dtype == dtype and kept[0].stands():
            return kept[1]
        self._mlp = None
        norm, mlp = Part(layer._modules, "post_attention_layernorm", DeepseekV3RMSNorm), layer.mlp
        if type(mlp) is DeepseekV3MLP:
            self._mlp = _dense(norm, Part(layer._modules, "mlp", DeepseekV3MLP), dtype)
        elif type(mlp) is DeepseekV3MoE:
            self._mlp = _experts(norm, Part(layer._modules, "mlp", DeepseekV3MoE), dtype)
        return None if self._mlp is None else self._mlp[1]


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _linears(mlp: Part) -> list[Part]:
    own: Any = mlp.places[mlp.name]
    return [mlp, *(Part(own._modules, name, nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))]


def _matrices(mlp: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def _dense(norm: Part, part: Part, dtype: torch.dtype) -> tuple[Lent, SingleMLP] | None:
    mlp: Any = part.places[part.name]
    lent = Lent.of([norm, *_linears(part)], dtype) if is_silu(mlp.act_fn) else None
    return None if lent is None else (lent, SingleMLP(_norm(norm.places[norm.name]), *_matrices(mlp)))


def _experts(norm: Part, part: Part, dtype: torch.dtype) -> tuple[Lent, SingleExperts] | None:
    moe: Any = part.places[part.name]
    experts, shared = moe.experts, moe.shared_experts
    if moe.config._experts_implementation != "deepseek_v3" or type(shared) is not DeepseekV3MLP:
        return None
    own = moe._modules
    parts = [norm, part, Part(own, "gate", DeepseekV3TopkRouter), Part(own, "experts", DeepseekV3Experts)]
    lent = Lent.of([*parts, *_linears(Part(own, "shared_experts", DeepseekV3MLP))], dtype)
    if lent is None or experts._is_expert_parallel or not is_silu(experts.act_fn) or not is_silu(shared.act_fn):
        return None
    stacks = (experts.gate_up_proj, experts.down_proj)
    made = SingleExperts(_norm(norm.places[norm.name]), moe.gate.as_router(), *stacks, _matrices(shared))
    return lent, made
