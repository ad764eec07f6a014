"""How bitsandbytes packs one matrix, as plain tensors of known sizes, and a stack of such matrices widened again.

Special about it: every expert is packed by itself, as bitsandbytes packs a linear's weight, so that experts can be
packed as they are read and widened without their neighbours. Blocks run over a matrix's rows end to end, so no height
or width is too odd.

Letters: E experts, N rows, K columns, B = ceil(N * K / 64) blocks.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from ..configuration.accounting import NF4_BYTES
from ..kernels import widen_4bit

BLOCK = 64
# Of the blocks' absolute maxima, where they are quantised too.
NESTED_BLOCK = 256

Parts = dict[str, torch.Tensor]
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Packing(Protocol):
    """A way to pack: `sizes` of one matrix [N, K], `pack` it, and `unpack` a stack of packed ones."""

    @property
    def label(self) -> str: ...

    def sizes(self, rows: int, columns: int) -> Sizes: ...

    def bytes_a_number(self, columns: int) -> float: ...

    def pack(self, matrix: torch.Tensor) -> Parts: ...

    def unpack(
        self, parts: Parts, rows: int, columns: int, dtype: torch.dtype, chosen: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4: two codes a byte, a maximum for each 64 numbers; nested, these maxima are 8-bit codes themselves.

    Attributes:
        quant_type: "nf4" or "fp4".
        nested: bitsandbytes' double quantisation (QLoRA paper, section 3).
    """

    quant_type: str
    nested: bool

    @property
    def label(self) -> str:
        return f"{self.quant_type.upper()}{', double quantised' if self.nested else ''}"

    def sizes(self, rows: int, columns: int) -> Sizes:
        """Suffix -> shape and dtype of what one matrix becomes."""
        blocks = -(-rows * columns // BLOCK)
        codes: Sizes = {"codes": ((-(-rows * columns // 2),), torch.uint8)}
        if not self.nested:
            return {**codes, "absmax": ((blocks,), torch.float32)}
        outer = -(-blocks // NESTED_BLOCK)
        nested: Sizes = {"nested_absmax": ((outer,), torch.float32), "offset": ((), torch.float32)}
        return {**codes, "absmax": ((blocks,), torch.uint8), **nested}

    def bytes_a_number(self, columns: int) -> float:
        """Bytes that a packed number takes, in matrices of any width."""
        return NF4_BYTES if self.nested else 1 / 2 + 4 / BLOCK

    def pack(self, matrix: torch.Tensor) -> Parts:
        """[N, K] in a dtype of 16 or 32 bits."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=self.nested, quant_type=self.quant_type
        )
        parts = {"codes": codes.flatten(), "absmax": state.absmax}
        if self.nested:
            parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        return parts

    def unpack(
        self, parts: Parts, rows: int, columns: int, dtype: torch.dtype, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        """The parts of a stack, [E, ..] each, to [E, N, K], or to the chosen ones."""
        device = parts["codes"].device
        nested = (parts["nested_absmax"], parts["offset"], _nested_map(device)) if self.nested else None
        wide = widen_4bit(
            parts["codes"],
            parts["absmax"],
            _table(self.quant_type, device),
            rows * columns,
            nested=nested,
            chosen=chosen,
            dtype=dtype,
        )
        return wide.view(-1, rows, columns)


@cache
def _table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 numbers that codes stand for."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device)  # type: ignore[no-any-return]


@cache
def _nested_map(device: torch.device) -> torch.Tensor:
    """The 256 numbers that codes of maxima stand for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EightBit:
    """Whole numbers up to 127 with the row's absolute maximum beside them, as in LLM.int8()."""

    label: str = "INT8"

    def sizes(self, rows: int, columns: int) -> Sizes:
        """Suffix -> shape and dtype of what one matrix becomes."""
        return {"codes": ((rows, columns), torch.int8), "absmax": ((rows,), torch.float32)}

    def bytes_a_number(self, columns: int) -> float:
        """Bytes that a packed number takes, in matrices of this width."""
        return 1 + 4 / columns

    def pack(self, matrix: torch.Tensor) -> Parts:
        """[N, K] of any floating dtype; bitsandbytes' own function would round it to float16 first."""
        wide = matrix.float()
        absmax = wide.abs().amax(dim=1)
        factor = 127 / torch.where(absmax > 0, absmax, 1)
        return {"codes": (wide * factor[:, None]).round().to(torch.int8), "absmax": absmax}

    def unpack(
        self, parts: Parts, rows: int, columns: int, dtype: torch.dtype, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        """The parts of a stack to [E, N, K], or to the chosen ones: a float32 product, rounded once to the dtype."""
        codes, scale = parts["codes"], parts["absmax"] / 127
        if chosen is not None:
            codes, scale = codes.index_select(0, chosen), scale.index_select(0, chosen)
        return torch.mul(codes, scale[..., None], out=torch.empty(codes.shape, dtype=dtype, device=codes.device))


def packing_of(config: Any) -> Packing:
    """What a `BitsAndBytesConfig` asks for.

    Raises:
        ValueError: neither 4 nor 8 bits, a 4-bit type that bitsandbytes does not know, 8-bit with 16-bit weights.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        raise ValueError("the BitsAndBytesConfig asks for nothing: set load_in_4bit=True or load_in_8bit=True")
    if config.load_in_4bit:
        if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}: choose 'nf4' or 'fp4'")
        return FourBit(config.bnb_4bit_quant_type, bool(config.bnb_4bit_use_double_quant))
    if config.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight=True keeps 16-bit weights; load without a quantization_config")
    return EightBit()
