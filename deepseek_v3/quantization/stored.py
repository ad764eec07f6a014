"""A checkpoint's tensors as they lie in its files, read one at a time, with each FP8 weight joined to its scale.

Special about it: the headers are checked before any weight is read, so a weight without its scale is an error and
never raw codes; a weight and its scale may lie in different files; a tensor is read by position into memory of its
own, so nothing of the files stays mapped and the folder may be overwritten afterwards.
"""

import os
from contextlib import ExitStack
from typing import Any

import torch

from ..configuration.layout import scale_shape
from ..conversion.errors import CheckpointError
from ..conversion.header import TensorInfo, open_regular, read_header
from ..kernels import dequantize_weight

SCALE_SUFFIX = "_scale_inv"
FP8, FP8_NAME = torch.float8_e4m3fn, "F8_E4M3"
# What weights may be in memory, as safetensors spells it.
DTYPE_NAMES = {FP8: FP8_NAME, torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# What the files may hold of a model.
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
TORCH_DTYPES |= {"F64": torch.float64, "F8_E8M0": torch.float8_e8m0fnu}
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_AGAIN = "download the file again, or convert the checkpoint anew"
_REMEDY = f"{_AGAIN[0].upper()}{_AGAIN[1:]}"


class CheckpointTensors:
    """The tensors of safetensors files by name, read when they are asked for. Close it when the weights are loaded.

    Args:
        files: paths of the files.

    Raises:
        CheckpointError: a file that is no sound safetensors file; a tensor that stands in two of them.
    """

    def __init__(self, files: list[str]) -> None:
        self._stack = ExitStack()
        self._infos: dict[str, TensorInfo] = {}
        self._descriptors: dict[str, int] = {}
        try:
            for file in files:
                self._add(os.fspath(file))
        except CheckpointError:
            self.close()
            raise

    def _add(self, file: str) -> None:
        for name, info in read_header(file).tensors.items():
            if name in self._infos:
                problem = f"stands in {self.file(name)} as well"
                raise CheckpointError(problem, file=file, tensor=name, remedy="remove one of the two")
            self._infos[name] = info
        self._descriptors[file] = open_regular(file)[0]
        self._stack.callback(os.close, self._descriptors[file])

    def __iter__(self) -> Any:
        return iter(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def file(self, name: str) -> str:
        """The name of the file that holds the tensor."""
        return os.path.basename(self._infos[name].file)

    def dtype(self, name: str) -> str:
        """The dtype as safetensors spells it, "F8_E4M3" for codes."""
        return self._infos[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The tensor, or one expert's matrix of a stack, in memory of its own.

        Raises:
            CheckpointError: the file was cut short since it was opened.
        """
        info = self._infos[name]
        shape, size = (info.shape, info.nbytes) if expert is None else (info.shape[1:], info.nbytes // info.shape[0])
        # safetensors would read a whole stack for one of its matrices, and every tensor into memory twice.
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
        rest, offset = tensor.reshape(-1).view(torch.uint8).numpy().data, info.offset + (expert or 0) * size
        while rest:
            done = os.preadv(self._descriptors[info.file], [rest], offset)
            if not done:
                raise CheckpointError("ends in the middle", file=info.file, tensor=name, remedy=_AGAIN)
            rest, offset = rest[done:], offset + done
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._infos.clear()
        self._stack.close()

    def fp8_weights(self) -> set[str]:
        """Names of the FP8 weights, every one of which is sure to have a scale that fits.

        Raises:
            ValueError: a scale that is missing, has the wrong shape or dtype, or belongs to no FP8 weight.
        """
        codes = {name for name in self if self.dtype(name).startswith("F8_E4M3") or self.dtype(name) == "F8_E5M2"}
        # `X.weight` has `X.weight_scale_inv`, transformers' fused `gate_up_proj` has `gate_up_proj_scale_inv`.
        scales = {name for name in self if name.endswith(SCALE_SUFFIX)}
        codes -= scales
        for name in sorted(codes):
            self._check_pair(name)
        for name in sorted(scales):
            if name.removesuffix(SCALE_SUFFIX) not in codes:
                owner = name.removesuffix(SCALE_SUFFIX)
                problem = f"{self.dtype(owner)} and no FP8 codes" if owner in self else "not in the checkpoint"
                raise ValueError(f"{name} ({self.file(name)}) is the scale of {owner}, which is {problem}. {_REMEDY}")
        return codes

    def _check_pair(self, name: str) -> None:
        scale, shape, here = name + SCALE_SUFFIX, self.shape(name), self.file(name)
        if self.dtype(name) != FP8_NAME:
            raise ValueError(f"{name} ({here}) is {self.dtype(name)}; only {FP8_NAME} can be loaded. {_REMEDY}")
        if scale not in self:
            raise ValueError(f"{name} ({here}) holds FP8 codes and its scale {scale} is in no file. {_REMEDY}")
        found, where = self.shape(scale), self.file(scale)
        fitting = _scale_shapes(name, shape)
        if found not in fitting:
            needed = " or ".join(str(list(one)) for one in fitting) or "two or three dimensions"
            raise ValueError(
                f"{scale} ({where}) has shape {list(found)}; the weight {list(shape)} in 128 x 128 blocks needs "
                f"{needed}. {_REMEDY}"
            )
        if self.dtype(scale) not in _SCALE_DTYPES:
            raise ValueError(f"{scale} ({where}) is {self.dtype(scale)}, which is no scale's dtype. {_REMEDY}")


def _scale_shapes(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that fit: in a stack, gate and up have blocks of their own, or share one grid in some files."""
    if len(shape) not in (2, 3):
        return []
    *experts, rows, columns = shape
    parts = (2, 1) if len(shape) == 3 and name.endswith("gate_up_proj") else (1,)
    grids = [(part, scale_shape(rows // part, columns)) for part in parts]
    return list(dict.fromkeys((*experts, part * height, width) for part, (height, width) in grids))


def read_scale(tensors: CheckpointTensors, name: str, expert: int | None = None) -> torch.Tensor:
    """A scale, or one expert's, as float32, which holds every stored format exactly.

    Raises:
        ValueError: a value that is not finite and positive.
    """
    scale = tensors.read(name, expert).float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        here = tensors.file(name)
        raise ValueError(f"{name} ({here}) holds a scale that is not finite and positive. {_REMEDY}")
    return scale


class StoredTensor:
    """Stands for one tensor of the files, or for one expert's matrix of a stack, in transformers' loader and is read
    when it is moved to its place."""

    def __init__(self, tensors: CheckpointTensors, name: str, expert: int | None = None) -> None:
        self._tensors, self.name, self.expert = tensors, name, expert

    def get_shape(self) -> list[int]:
        shape = list(self._tensors.shape(self.name))
        return shape if self.expert is None else shape[1:]

    def get_dtype(self) -> str:
        return self._tensors.dtype(self.name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.get_shape())

    def __getitem__(self, index: Any) -> "StoredTensor":
        if index is not Ellipsis:
            raise NotImplementedError(f"{self.name} is loaded whole, not in parts")
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """Read it, on `device` in `dtype`."""
        tensor = self.values(device)
        # A scale is never cast with the model.
        return tensor.to(device=device, dtype=None if self.name.endswith(SCALE_SUFFIX) else dtype)

    def values(self, device: Any) -> torch.Tensor:
        if self.name.endswith(SCALE_SUFFIX):
            return read_scale(self._tensors, self.name, self.expert)
        return self._tensors.read(self.name, self.expert)


class DequantizedTensor(StoredTensor):
    """The same for an FP8 weight: reading gives codes times scale, a float32 product rounded once to the dtype."""

    def get_dtype(self) -> str:
        return "BF16"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        codes = self._tensors.read(self.name, self.expert).to(device)
        scale = read_scale(self._tensors, self.name + SCALE_SUFFIX, self.expert).to(codes.device)
        return dequantize_parts(codes, scale, dtype or torch.bfloat16)


def dequantize_parts(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_weight` of [.., rows, columns], also of gate above up where each has blocks of its own.

    Fusing gate and up of a height that 128 does not divide leaves one block row more than the joint height has.
    """
    rows, columns = codes.shape[-2:]
    if scale.shape[-2] == scale_shape(rows, columns)[0]:
        return dequantize_weight(codes, scale, dtype=dtype)
    halves = zip(codes.chunk(2, dim=-2), scale.chunk(2, dim=-2), strict=True)
    return torch.cat([dequantize_weight(c, s, dtype=dtype) for c, s in halves], dim=-2)


class Deferred:
    """A `StoredTensor` that waits, once its place is known, until a converter reads it into a fused tensor."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.device: Any = None
        self.dtype: torch.dtype | None = None

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: Any) -> "Deferred":
        self.stored[index]
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Deferred":
        self.device, self.dtype = device, dtype
        return self

    def read(self) -> torch.Tensor:
        """The tensor on its device in its dtype."""
        return self.stored.to(self.device, self.dtype)
