"""Adapters and FP8: a kept model turned plain so that they can be merged, and what quantising again did to the change.

Special about it: a low-rank change is small beside E4M3's steps, so added to codes, or rounded to them, much of it may
vanish. It is merged in the model's own dtype, quantised once, and what is left of it is measured.
"""

from dataclasses import dataclass, field
from math import nan, sqrt
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts import FP8Experts
from .linear import CodesModule, FP8Linear
from .stored import SCALE_SUFFIX, dequantize_parts

_SHOWN = 5
_BAND_ROWS = 128


def dequantize_modules(model: Any, dtype: torch.dtype | None = None) -> None:
    """Put a plain module in the place of every one that holds codes: `model.dequantize()`.

    The weights are those of `FP8Config(keep=False)`, bit for bit. One module is widened after the other, so the peak
    is the BF16 model; offloaded ones stay offloaded. Adapters on these modules stay, and can then be merged.

    Args:
        model: a model of this package, perhaps with adapters in it; changed in place.
        dtype: the dtype that the rest of the model has already; None for whatever that is.

    Raises:
        ValueError: another `dtype`.
    """
    own = model.get_input_embeddings().weight.dtype
    if dtype not in (None, own):
        raise ValueError(f"dtype={dtype}: the rest of the model is {own}. Call model.to({dtype}) first")
    # Whoever trains adapters has frozen everything else, and that must stay so.
    trainable = not getattr(model, "peft_config", None)
    for name in [name for name, module in model.named_modules() if isinstance(module, CodesModule)]:
        old = model.get_submodule(name)
        new = _plain(old, model.config, own, trainable)
        new.train(old.training)
        model.set_submodule(name, new)
    model.config._is_quantized = False


def _plain(old: CodesModule, config: Any, dtype: torch.dtype, trainable: bool) -> nn.Module:
    with torch.device("meta"):
        if isinstance(old, FP8Linear):
            new: nn.Module = nn.Linear(old.in_features, old.out_features, bias=False)
            new.bias = old.bias
        else:
            assert isinstance(old, FP8Experts)
            new = old.plain_class(config)
    hook = getattr(old, "_hf_hook", None)
    offloaded = _offloaded(hook)
    for name in [n for n, _ in old.named_parameters(recurse=False) if f"{n}{SCALE_SUFFIX}" in old._parameters]:
        if offloaded is None:
            codes, scale = getattr(old, name), getattr(old, name + SCALE_SUFFIX)
        else:
            codes, scale = offloaded[name], offloaded[name + SCALE_SUFFIX]
        weight = dequantize_parts(codes.detach(), scale.detach(), dtype)
        if offloaded is not None:
            _store(offloaded, name, weight)
        setattr(new, name, nn.Parameter(weight, requires_grad=trainable))
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    return new


def _offloaded(hook: Any) -> Any:
    """accelerate's map of a module's weights by name, None where they are in the module itself."""
    parts = getattr(hook, "hooks", [hook])
    return next((part.weights_map for part in parts if getattr(part, "offload", False)), None)


def _store(weights: Any, name: str, value: torch.Tensor) -> None:
    """Replace codes and scale in what accelerate loads a module from: memory, or files of the offload folder."""
    from accelerate.utils.offload import offload_weight

    loader, key = weights.dataset, weights.prefix + name
    if isinstance(loader, dict):
        loader[key] = value
        del loader[key + SCALE_SUFFIX]
        return
    if key in loader.state_dict:
        loader.state_dict[key] = value
    else:
        offload_weight(value, key, loader.save_folder, loader.index)
    for kept in (loader.state_dict, loader.index):
        kept.pop(key + SCALE_SUFFIX, None)
    loader.all_keys.remove(key + SCALE_SUFFIX)


class Survival(NamedTuple):
    """What is left of the change to one weight, or to all of them, after it was rounded to FP8.

    With d the change before and e the change after rounding, as vectors:

    Attributes:
        share: <d, e> / <d, d>: 1 where the change survived, 0 where the old codes came back.
        cosine: <d, e> / (|d| |e|): low where rounding put noise in the change's place; 0 where e is zero.
        moved: |e - d| / |d|: how far rounding moved the weights, in sizes of the change.
    """

    share: float
    cosine: float
    moved: float

    @property
    def vanished(self) -> bool:
        """Whether most of the change is gone, or is lost in noise."""
        return not (self.share > 0.5 and self.cosine > 0.5)


class _Sums(NamedTuple):
    """<d, d>, <e, e> and <d, e>."""

    before: float = 0.0
    after: float = 0.0
    both: float = 0.0

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def survival(self) -> Survival:
        if not self.before:
            return Survival(nan, nan, nan)
        moved = max(0.0, self.before + self.after - 2 * self.both)
        cosine = self.both / sqrt(self.before * self.after) if self.after else 0.0
        return Survival(self.both / self.before, cosine, sqrt(moved / self.before))


@dataclass
class RoundingReport:
    """What `save_pretrained(..., quantize="fp8", original=folder)` did to the changes of a fine-tuned model.

    Attributes:
        untouched: how many of the weights that FP8 is for still are what the original checkpoint holds; where it
            holds codes, they were kept.
        tensors: official name of each weight that was changed and quantised again -> what survived.
        overall: the same for all of them as one vector; NaN where nothing was changed.
    """

    untouched: int = 0
    tensors: dict[str, Survival] = field(default_factory=dict)
    _total: _Sums = field(default=_Sums(), repr=False)

    @property
    def overall(self) -> Survival:
        return self._total.survival()

    @property
    def vanished(self) -> list[str]:
        """Names of the weights whose change is mostly gone, the worst first."""
        return sorted((n for n, s in self.tensors.items() if s.vanished), key=lambda name: self.tensors[name].cosine)

    def add(
        self,
        name: str,
        original: torch.Tensor,
        wanted: torch.Tensor,
        written: torch.Tensor,
        rounded: torch.Tensor | None = None,
    ) -> None:
        """Count one weight that was changed.

        Args:
            name: its official name.
            original, wanted, written: [rows, columns]: before training, after it, and as the codes have it.
            rounded: the original as FP8 would have it, where it was not FP8; None for one that was.
        """
        sums = _Sums()
        tensors = (original, wanted, original if rounded is None else rounded, written)
        for rows in zip(*(tensor.split(_BAND_ROWS) for tensor in tensors), strict=True):
            start, aim, begin, end = (tensor.double() for tensor in rows)
            d, e = (aim - start).flatten(), (end - begin).flatten()
            sums = sums.plus(_Sums(float(d @ d), float(e @ e), float(d @ e)))
        if sums.before:
            self.tensors[name] = sums.survival()
            self._total = self._total.plus(sums)

    def text(self) -> str:
        """One paragraph for people."""
        if not self.tensors:
            return f"{self.untouched} weights are those of the original checkpoint; none was changed."
        share, cosine, moved = self.overall
        return (
            f"{self.untouched} weights are those of the original checkpoint, {len(self.tensors)} were changed and "
            f"quantised again: {share:.0%} of the change survived, under rounding {moved:.2f} times the size of the "
            f"change (cosine {cosine:.2f} between the change before and after)."
        )

    def warning(self) -> str | None:
        """What to do about changes that are mostly gone; None where there are none."""
        names = self.vanished
        if not names:
            return None
        worst = ", ".join(f"{name} ({self.tensors[name].share:.0%})" for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (
            f"Most of the change vanished in FP8's rounding in {len(names)} of {len(self.tensors)} weights: {worst}"
            f"{more}. Save the model in BF16, or keep the adapter beside the original weights."
        )
