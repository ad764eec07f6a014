"""`Codes`: a parameter of FP8 codes to which nothing can be added.

Special about it: PEFT merges an adapter by `weight.data += change`. Codes that took it would lack their scales, so the
sum is refused in words that name the way out. Every other operation sees a plain parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SUMS = ("__iadd__", "add_", "__isub__", "sub_")


class _Data(torch.Tensor):
    """What `Codes.data` gives; copies of it refuse as well."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _SUMS:
            raise ValueError(
                "an adapter cannot be merged into FP8 codes: they would round its change away. Call "
                "model.dequantize() first, or keep the adapter beside them"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class Codes(nn.Parameter):
    """Frozen codes, as `weight.data += ...` finds them."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "Codes":
        return torch.Tensor._make_subclass(cls, data.detach().as_subclass(torch.Tensor), False)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self).as_subclass(_Data)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value.as_subclass(torch.Tensor))  # type: ignore[attr-defined]
