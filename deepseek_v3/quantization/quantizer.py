"""The quantiser that transformers calls while it loads an FP8 checkpoint into one of this package's models.

Special about it: which modules keep FP8 is read off the files' headers, not off a list of names, so a module becomes
an FP8 one exactly if its codes are stored; anything that config.json announces and the files do not hold is no
reason to fail.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..configuration.configuration_deepseek_v3 import FP8_METHOD
from ..configuration.layout import official_tensors
from ..kernels.dispatch import cuda_reason
from ..kernels.fp8 import FP8_CARD
from .config import FP8Config, request
from .experts import FP8Experts
from .linear import CodesModule, FP8Linear
from .merging import dequantize_modules
from .saving import are_powers_of_two
from .stored import FP8, SCALE_SUFFIX, CheckpointTensors, dequantize_parts

logger = logging.get_logger(__name__)


class DeepseekFP8Quantizer(HfQuantizer):
    """Keeps or dequantises the FP8 weights of official checkpoints."""

    quantization_config: FP8Config
    requires_calibration = False

    def __init__(self, quantization_config: FP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint: CheckpointTensors | None = None
        # Names of the stored FP8 weights, and of those that the model wants without their scales.
        self.codes: set[str] = set()
        self.dequantized: set[str] = set()
        self.state_dict_to_save: dict[str, torch.Tensor] | None = None
        # Settled once kept scales are loaded: whether ue8m0 could hold every one of them.
        self.power_of_two_scales = False
        self._why = ""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Settle whether the weights stay FP8."""
        wanted = request()
        if wanted is not None:
            self.quantization_config.keep, self.quantization_config.compute = wanted.keep, wanted.compute
        keep = self.quantization_config.keep
        if keep is None:
            reason = no_fp8_reason(device_map)
            keep, self._why = reason is None, reason or "the device computes FP8"
        else:
            self._why = f"FP8Config(keep={keep})"
        self.quantization_config.dequantize = not keep

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if files and files[0].endswith(".safetensors"):
            self.checkpoint = CheckpointTensors(files)
            self.codes = self.checkpoint.fp8_weights()
        else:
            self.codes = {s.name for s in official_tensors(model.config, quantized=True) if s.kind == "fp8"}
        config = self.quantization_config
        self.dequantized = self.codes
        if not self.codes:
            config.dequantize = True
            logger.warning("config.json has a quantization_config and the files hold no FP8 weights: it is ignored.")
        elif config.dequantize:
            dtype = str(kwargs.get("dtype") or model.dtype).removeprefix("torch.")
            logger.warning(f"{len(self.codes)} FP8 weights are dequantised to {dtype}: {self._why}.")
        else:
            replaced = replace_modules(model, self.codes, config)
            self.dequantized = {name for name in self.codes if _owner(name) not in replaced}
            kept = len(self.codes) - len(self.dequantized)
            logger.warning(f"{kept} FP8 weights stay FP8 in {len(replaced)} modules: {self._why}.")
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        kept: list[Any] = [module for module in model.modules() if isinstance(module, CodesModule)]
        scales = []
        for module in kept:
            module.freeze()
            scales += [p for p in module.codes_and_scales() if p.dtype != FP8 and not p.is_meta]
        self.power_of_two_scales = bool(scales) and all(map(are_powers_of_two, scales))
        if scales and self.quantization_config.scale_fmt == "ue8m0" and not self.power_of_two_scales:
            logger.warning("config.json says scale_fmt ue8m0 and the scales are no powers of two: they stay float32.")
            self.quantization_config.scale_fmt = None
            for module in kept:
                module.scale_fmt = None
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: see `dequantize_modules`."""
        dequantize_modules(model, dtype)
        self.remove_quantization_config(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict]:
        """What `save_pretrained` of this package has prepared; transformers drops the one that it was given."""
        prepared, self.state_dict_to_save = self.state_dict_to_save, None
        return prepared, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def no_fp8_reason(device_map: Any) -> str | None:
    """Why the devices of `device_map` (None: the current one) do not compute FP8; None where they do."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; FP8Config(keep=True) keeps them here too"
    named = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    named = ["cuda" if place is None or place in _AUTOMATIC else place for place in named]
    named = [f"cuda:{place}" if isinstance(place, int) else place for place in named]
    devices = [torch.device(place) for place in named if place != "disk"]
    reasons = [cuda_reason(device, FP8_CARD) for device in devices if device.type != "cpu"]
    if not reasons:
        return "the device map names no CUDA device"
    return next((reason for reason in reasons if reason), None)


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def replace_modules(model: nn.Module, codes: set[str], config: FP8Config) -> set[str]:
    """Put an FP8 module in the place of every one whose codes are stored; returns their names.

    Raises:
        ValueError: a layer whose experts are FP8 in part.
    """
    # A base model may be loaded from a causal LM's folder and the reverse.
    codes = codes | {name.removeprefix("model.") for name in codes} | {f"model.{name}" for name in codes}
    replaced = set()
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.Linear) and f"{name}.weight" in codes:
            new = FP8Linear.like(module, config)
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and name.endswith("experts"):
            if _experts_are_fp8(name, module.num_experts, codes):  # type: ignore[arg-type]
                new = FP8Experts.like(module, config)
        if new is not None:
            model.set_submodule(name, new)
            replaced.add(_owner(name))
    return replaced


def _owner(name: str) -> str:
    """The module that a stored weight belongs to, by its name in a base model."""
    name = name.removeprefix("model.").removesuffix(".weight")
    return name.partition(".experts.")[0] + ".experts" if ".experts." in name else name


def _experts_are_fp8(name: str, experts: int, codes: set[str]) -> bool:
    if f"{name}.gate_up_proj" in codes and f"{name}.down_proj" in codes:
        return True
    names = (f"{name}.{e}.{p}.weight" for e in range(experts) for p in ("gate_proj", "up_proj", "down_proj"))
    # The first one that is missing ends the search: `experts` is config.json's word, and may be anything.
    missing = next((weight for weight in names if weight not in codes), None)
    if missing and any(code.startswith(f"{name}.") for code in codes):
        raise ValueError(
            f"{missing} holds no FP8 codes although other experts of its layer do. Load the checkpoint with "
            "quantization_config=FP8Config(keep=False)"
        )
    return missing is None


def dequantized_state_dict(model: Any, state_dict: Any) -> Any:
    """`state_dict` with every FP8 weight dequantised that `model` does not keep in FP8.

    Raises:
        ValueError: such a weight has no scale beside it.
    """
    codes = [name for name, tensor in state_dict.items() if getattr(tensor, "dtype", None) == FP8]
    kept = {_owner(name) for name, module in model.named_modules() if isinstance(module, CodesModule)}
    plain = [name for name in codes if _owner(name) not in kept and _fused_owner(name) not in kept]
    if not plain:
        return state_dict
    result = dict(state_dict)
    for name in plain:
        scale = result.pop(name + SCALE_SUFFIX, None)
        if scale is None:
            raise ValueError(
                f"{name} holds FP8 codes and its scale {name}{SCALE_SUFFIX} is not in the state dict. Load both "
                "together, or the folder with from_pretrained"
            )
        result[name] = dequantize_parts(result[name], scale, model.dtype)
    return result


def _fused_owner(name: str) -> str:
    return _owner(name.rpartition(".")[0])


def register() -> None:
    """Make transformers know the method under its own name."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[FP8_METHOD] = FP8Config
    AUTO_QUANTIZER_MAPPING[FP8_METHOD] = DeepseekFP8Quantizer


def unregister() -> None:
    """Take `register` back."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(FP8_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(FP8_METHOD, None)
