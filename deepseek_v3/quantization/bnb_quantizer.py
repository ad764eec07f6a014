"""The quantiser that transformers calls while it loads one of this package's models in 4 or 8 bits.

Special about it: linears become bitsandbytes' own, as everywhere; the routed experts, which transformers would leave
in BF16, are packed as they are read, one expert after the other, so that beside the final size there is one matrix in
memory. Embedding, head, norms, router and the MTP modules' `eh_proj` stay as they are stored.

Letters: E routed experts.
"""

from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ..configuration.accounting import account
from .bnb_config import BNB_METHOD, BnbLoadingConfig
from .bnb_experts import STACKS, BnbExperts
from .bnb_packing import BLOCK, packing_of

logger = logging.get_logger(__name__)


class Stack(Protocol):
    """Matrices [N, K] by the number of their expert."""

    def __getitem__(self, expert: int, /) -> torch.Tensor: ...


class PackStack(ConversionOps):
    """A whole stack [E, N, K] as it lies in the files, packed into its module; other weights as `others` does it."""

    def __init__(self, others: Any) -> None:
        self.others = others

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        plain = {}
        for full_name, value in input_dict.items():
            owner, _, name = full_name.rpartition(".")
            experts = model.get_submodule(owner)
            if isinstance(experts, BnbExperts):
                stack = value[0] if isinstance(value, list) else value
                pack(experts, name, stack.device, stack)
                kwargs["missing_keys"].discard(full_name)
            else:
                plain[full_name] = value
        result: dict[str, torch.Tensor] = self.others.convert(plain, model=model, **kwargs)
        return result


def pack(experts: BnbExperts, name: str, device: Any, matrices: Stack) -> None:
    """Fill the stack `name` with the matrices [N, K] of all experts, taken one at a time."""
    experts.reserve(name, device)
    for expert in range(experts.num_experts):
        experts.put(name, expert, matrices[expert])


class PacksExperts:
    """What the quantisers for 4 and for 8 bits share; mixed into transformers' own."""

    quantization_config: Any
    pre_quantized: bool

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> Any:
        config = self.quantization_config
        packing, skipped = packing_of(config), config.llm_int8_skip_modules
        if skipped is None:
            # The names that transformers would take, and the projection that no published recipe quantises.
            config.llm_int8_skip_modules = [*get_keys_to_not_convert(model), "eh_proj"]
        if config.load_in_4bit:
            config.llm_int8_skip_modules = config.llm_int8_skip_modules + _narrow(model, config.llm_int8_skip_modules)
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)  # type: ignore[misc]
        config.llm_int8_skip_modules = skipped
        compute_dtype = config.bnb_4bit_compute_dtype if config.load_in_4bit else None
        kept: list[str] = self.modules_to_not_convert  # type: ignore[attr-defined]
        for name, module in list(model.named_modules()):
            if _are_experts(name, module) and should_convert_module(name, kept):
                model.set_submodule(name, BnbExperts(module, packing, compute_dtype, self.pre_quantized))
            elif hasattr(module, "support_avx512bf16_for_cpu"):
                # Else a forward on some CPUs lays the weight out anew, in place, with its maxima rounded: what is
                # saved after it is another model, and heights that are no multiple of 32 fail.
                module.support_avx512bf16_for_cpu = False
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, BnbExperts):
            return name in STACKS and not module.packed(name)
        return bool(super().param_needs_quantization(model, param_name, **kwargs))  # type: ignore[misc]

    def get_quantize_ops(self) -> PackStack:
        return PackStack(super().get_quantize_ops())  # type: ignore[misc]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plain = self.quantization_config.plain()
        self.quantization_config = model.config.quantization_config = plain
        model.quantization_method = plain.quant_method
        packed = {name: module for name, module in model.named_modules() if isinstance(module, BnbExperts)}
        for name, module in packed.items():
            for stack in STACKS:
                _check_packed(f"{name}.{stack}", module, stack)
        if packed:
            logger.warning(_bill(list(packed.values()), model.config))
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: plain linears and experts with the weights that were packed.

        Raises:
            ValueError: adapters lie over them, which would still be those of packed layers.
        """
        if getattr(model, "peft_config", None):
            raise ValueError(
                "the model has adapters made for packed layers: call dequantize() on the base, then put the saved "
                "adapter over it with PeftModel.from_pretrained"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, BnbExperts):
                model.set_submodule(name, module.plain(model.config, dtype or model.dtype))
        return super()._dequantize(model, dtype=dtype)  # type: ignore[misc]


def _narrow(model: nn.Module, skipped: list[str]) -> list[str]:
    """Names of the linears whose rows end within a block of 64, said in the log once.

    bitsandbytes widens them wrongly on the CPU; and what is saved on one device is to be the same on every other.
    """
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    narrow = {
        name: module.in_features
        for name, module in linears
        if module.in_features % BLOCK and should_convert_module(name, skipped)
    }
    if narrow:
        first = next(iter(narrow))
        logger.warning(
            f"{len(narrow)} linears are left in 16 bits: bitsandbytes packs blocks of {BLOCK} numbers, which their "
            f"widths are no multiples of ({first}: {narrow[first]})."
        )
    return list(narrow)


def _bill(packed: list[BnbExperts], config: Any) -> str:
    """One line: the bytes of the packed experts beside what the accounting says of all that the model has."""
    bill, packing = account(config), packed[0].packing
    layers = bill.moe_layers + (config.num_nextn_predict_layers or 0)
    third = config.n_routed_experts * layers * bill.expert_parameters / 3  # gate, up and down are of one size
    widths = (config.hidden_size, config.hidden_size, config.moe_intermediate_size)
    expected = sum(third * packing.bytes_a_number(width) for width in widths)
    found = sum(experts.nbytes() for experts in packed)
    unit, name = (1e9, "GB") if 6 * third >= 1e9 else (1e6, "MB")
    return (
        f"The routed experts of {len(packed)} layers are packed as {packing.label}: {found / unit:.3f} {name}, "
        f"{found / (3 * third):.3f} bytes a parameter; the accounting says {expected / unit:.3f} {name} for {layers} "
        f"layers, and {6 * third / unit:.3f} {name} in BF16."
    )


def _are_experts(name: str, module: nn.Module) -> bool:
    return name.endswith("experts") and all(isinstance(getattr(module, stack, None), nn.Parameter) for stack in STACKS)


def _check_packed(full_name: str, experts: BnbExperts, stack: str) -> None:
    if not experts.packed(stack):
        raise ValueError(
            f"{full_name}: the checkpoint holds none of its weights, and random ones are not packed. Download the "
            "missing shard, or correct config.json"
        )


class DeepseekBnb4BitQuantizer(PacksExperts, Bnb4BitHfQuantizer):
    """`BitsAndBytesConfig(load_in_4bit=True)`."""


class DeepseekBnb8BitQuantizer(PacksExperts, Bnb8BitHfQuantizer):
    """`BitsAndBytesConfig(load_in_8bit=True)`."""


def quantizer_of(config: BnbLoadingConfig, **kwargs: Any) -> PacksExperts:
    """The one that the configuration asks for."""
    kind = DeepseekBnb4BitQuantizer if config.load_in_4bit else DeepseekBnb8BitQuantizer
    return kind(config, **kwargs)


def register() -> None:
    """Make transformers know the method that `BnbLoadingConfig` carries."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[BNB_METHOD] = BnbLoadingConfig
    AUTO_QUANTIZER_MAPPING[BNB_METHOD] = quantizer_of  # type: ignore[assignment]


def unregister() -> None:
    """Take `register` back."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(BNB_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(BNB_METHOD, None)
