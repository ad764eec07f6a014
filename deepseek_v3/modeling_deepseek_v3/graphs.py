"""CUDA graphs of decode steps. With few tokens a step is bound by the host's launches, which a replay makes at once.

Special about it: a graph replays on the addresses that it was captured with, so what changes between steps (states,
positions, slots) is copied into tensors of its own, every view of the cache shows the whole storage, and how much of
that counts is read from the device. Storage that grew has another address: its step is captured anew, which happens
as rarely as storage grows.

Letters: B batch, T new tokens.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..quantization import FP8Experts, FP8Linear
from ..quantization.linear import multiplies_fp8
from .attention import DeepseekV3Attention, Spans
from .cache import LatentCache
from .cache_growing import LatentLayer
from .cache_layers import Extension
from .layers import DeepseekV3RMSNorm
from .moe import DeepseekV3Experts, DeepseekV3TopkRouter

# What owns parameters in a step that never waits for the device.
_CAPTURABLE = {nn.Linear, nn.Embedding, DeepseekV3RMSNorm, DeepseekV3TopkRouter, DeepseekV3Experts}
MOST_TOKENS = 8  # new tokens of a row that the decode kernel takes at once: one, or one and its drafts

# By model, the steps whose kernels are compiled.
_COMPILED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()

Tensors = tuple[torch.Tensor | None, ...]


class DecodeGraphs:
    """The captured steps of one `generate` call.

    Args:
        starts: int32 [B], first slot that a row of the batch sees; None where that is slot 0 for all.
        compiled: names and shapes of the steps whose kernels are compiled; it grows.
    """

    def __init__(self, starts: torch.Tensor | None, compiled: set[Any]) -> None:
        self.starts, self.compiled = starts, compiled
        self._steps: dict[Any, tuple[Tensors, Callable[[], torch.Tensor]]] = {}
        self._pool: Any = None
        self._inside = False  # of a function that is run or captured as a whole

    @staticmethod
    def take(tokens: int) -> bool:
        """Whether a step may have so many new tokens a row."""
        return tokens <= MOST_TOKENS

    def select(self, keep: torch.Tensor) -> None:
        """Go on with the rows `keep` of the batch."""
        if self.starts is not None:
            self.starts = self.starts[keep]

    def spans(self, cache: LatentCache, batch: int, tokens: int) -> Spans | None:
        """What T new tokens of every row see that are appended to `cache`; None where a mask must say it."""
        layer = cache.layers[0] if cache.layers else None
        if not self.take(tokens) or not isinstance(layer, LatentLayer) or not layer.is_initialized:
            return None
        seen = layer.get_seq_length()
        slots = torch.arange(seen, seen + tokens, device=layer.device).expand(batch, -1)
        return self._within(cache.layers[: cache.config.num_hidden_layers], slots, self.starts, seen + tokens)

    def row_spans(self, layers: list[Any], slots: torch.Tensor, extent: int, least: int = 0) -> Spans | None:
        """As `spans` where rows write to [B, T] slots of their own below `extent` and see none before `least`.

        layers: the cache's layers that are written to.
        """
        if not self.take(slots.shape[1]):
            return None
        starts = self.starts
        if least:
            floor = torch.full((len(slots),), least, dtype=torch.int32, device=slots.device)
            starts = floor if starts is None else torch.maximum(starts, floor)
        return self._within(layers, slots, starts, extent)

    @staticmethod
    def _within(layers: list[Any], slots: torch.Tensor, starts: torch.Tensor | None, extent: int) -> Spans:
        """Spans of the layers' whole storage, wherever it begins at the time of the step."""
        for layer in layers:
            layer.reserve(extent)  # which may move where storage begins
        layer = layers[0]
        if layer.place is not None:
            slots = slots - layer.place
            starts = None if starts is None else (starts - layer.place).clamp(min=0).int()
        return Spans(starts, None, Extension(slots, extent, whole=True), layer.window)

    def run(
        self,
        name: Any,
        layers: list[LatentLayer],
        extent: int,
        function: Callable[..., torch.Tensor],
        inputs: Tensors,
    ) -> torch.Tensor:
        """`function(*inputs)`, replayed from the second time on that these names and shapes are seen.

        Functions nest: what the outermost one runs becomes part of its graph.

        Args:
            name: tells functions apart.
            layers: the cache's layers that the function writes to.
            extent: how many slots of theirs then hold something.
            function: made of launches alone; it may read nothing from the device.
            inputs: all tensors that differ from step to step, or None; not those that keep their place, which the
                function may change.
        """
        if self._inside:
            return function(*inputs)
        for layer in layers:
            layer.count(extent)
        self._inside = True
        try:
            return self._run(name, layers, function, inputs)
        finally:
            self._inside = False

    def _run(
        self, name: Any, layers: list[LatentLayer], function: Callable[..., torch.Tensor], inputs: Tensors
    ) -> torch.Tensor:
        kind = (name, tuple(None if tensor is None else tensor.shape for tensor in inputs))
        if kind not in self.compiled:  # which no capture may do
            self.compiled.add(kind)
            return function(*inputs)
        addresses = tuple(layer.address for layer in layers)
        key = (*kind, addresses)
        step = self._steps.get(key)
        if step is None:
            self._forget(name, addresses)
            own = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
            step = self._steps[key] = own, self._capture(function, own)
        for mine, given in zip(step[0], inputs, strict=True):
            if mine is not None:
                mine.copy_(given)  # type: ignore[arg-type]
        return step[1]().clone()

    def _forget(self, name: Any, addresses: tuple[int, ...]) -> None:
        """Drop the steps over storage that is no more."""
        self._steps = {key: step for key, step in self._steps.items() if key[0] != name or key[2] == addresses}
        if not self._steps:
            self._pool = None  # the last graph took it along

    def _capture(self, function: Callable[..., torch.Tensor], inputs: Tensors) -> Callable[[], torch.Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(*inputs)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


def make_graphs(model: nn.Module, cache: Any, mask: torch.Tensor | None) -> DecodeGraphs | None:
    """Graphs for decoding with the base model `model`, or None where its steps cannot be captured.

    Args:
        model: a `DeepseekV3Model`, adapters included.
        cache: the call's cache; it must be a `LatentCache` that grows.
        mask: [B, S] bool, the prompt's tokens, or None for no padding. Rows with padding between tokens have no
            graph.
    """
    grows = type(cache) is LatentCache and cache.max_cache_len is None and not cache.offloading
    if not grows or not is_capturable(model) or torch.cuda.is_current_stream_capturing():
        return None
    side_by_side, starts = starts_of(mask)
    return DecodeGraphs(starts, _COMPILED.setdefault(model, set())) if side_by_side else None


def starts_of(mask: torch.Tensor | None) -> tuple[bool, torch.Tensor | None]:
    """Whether each row's tokens lie side by side, and where they start: int32 [B], or None for slot 0 everywhere."""
    if mask is None:
        return True, None
    slots = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, slots, mask.shape[1]).amin(dim=1)
    last = torch.where(mask, slots, -1).amax(dim=1)
    side_by_side, padded = torch.stack(((last - first + 1 == mask.sum(dim=1)).all(), (first > 0).any())).tolist()
    return bool(side_by_side), first.int() if padded else None


def is_capturable(model: nn.Module) -> bool:
    """Whether a decode step of `model` is made of launches on one GPU alone."""
    config: Any = model.config
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if (
        model.training
        or torch.is_autocast_enabled("cuda")
        or config._attn_implementation == "eager"
        or rope in ("dynamic", "longrope")
    ):
        return False
    if config._experts_implementation != "deepseek_v3" or config.mla_form == "expanded":
        return False
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda" and all(map(_is_capturable, model.modules()))


def _is_capturable(module: nn.Module) -> bool:
    if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
        return False
    if not any(True for _ in module.parameters(recurse=False)) or type(module) in _CAPTURABLE:
        return not isinstance(module, DeepseekV3Attention) or module.lends_norms()
    # Weight-only products ask the device which experts are hit.
    device = next(module.parameters()).device
    return isinstance(module, FP8Linear | FP8Experts) and multiplies_fp8(device, module.compute)
