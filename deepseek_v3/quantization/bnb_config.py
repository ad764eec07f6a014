"""How a `BitsAndBytesConfig` reaches this package's quantiser while a model loads, and stays what it was afterwards.

Special about it: transformers chooses a quantiser by the configuration's method, for every model alike. Only while one
of this package's models loads, its configuration carries a method of its own; the loaded model, its config.json and
whoever asks it (PEFT, Trainer) see the ordinary "bitsandbytes".
"""

import copy
from typing import Any

from transformers import BitsAndBytesConfig, PretrainedConfig

from .config import is_fp8

BNB_METHOD = "deepseek_bitsandbytes"


class BnbLoadingConfig(BitsAndBytesConfig):
    """A `BitsAndBytesConfig` for the time of loading."""

    @classmethod
    def of(cls, config: Any) -> "BnbLoadingConfig":
        """From the ordinary configuration, or its dictionary."""
        values = dict(config if isinstance(config, dict) else config.to_dict())
        values = {name: value for name, value in values.items() if not name.startswith("_") and name != "quant_method"}
        new = cls(**values)
        new.quant_method = BNB_METHOD  # type: ignore[assignment]
        return new

    def plain(self) -> BitsAndBytesConfig:
        """The ordinary configuration again."""
        values = {name: value for name, value in self.to_dict().items() if not name.startswith("_")}
        values.pop("quant_method")
        return BitsAndBytesConfig(**values)

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dictionary that a config.json has here; transformers does not tell the two apart."""
        # It would take these two for its own quantiser's.
        return default if key in ("load_in_4bit", "load_in_8bit") else getattr(self, key, default)


def is_bnb(quantization_config: Any) -> bool:
    """Whether a `quantization_config`, dictionary or object, is bitsandbytes'."""
    if isinstance(quantization_config, dict):
        return bool(
            quantization_config.get("quant_method") == "bitsandbytes"
            or quantization_config.get("load_in_4bit")
            or quantization_config.get("load_in_8bit")
        )
    return isinstance(quantization_config, BitsAndBytesConfig)


def bnb_arguments(config_class: Any, path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained`'s keyword arguments, such that this package's quantiser serves bitsandbytes' configurations.

    Where FP8 weights are to be packed, the file's own `quantization_config` goes: they are dequantised as they are
    read.

    Args:
        config_class: of the model.
        path: folder or name of the checkpoint, or None.
        kwargs: as given; unchanged where nothing speaks of bitsandbytes.
    """
    kwargs = dict(kwargs)
    wanted, config = kwargs.get("quantization_config"), kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        where = path if config is None else config
        if where is None:
            return kwargs
        others = {name: value for name, value in kwargs.items() if name not in ("config", "quantization_config")}
        stored = config_class.get_config_dict(where, **others)[0].get("quantization_config")
        if not is_bnb(wanted) and not is_bnb(stored):
            return kwargs
        config, unused = config_class.from_pretrained(where, return_unused_kwargs=True, **others)
        taken = {name for name in others if name not in unused and hasattr(config, name)}
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
    stored = getattr(config, "quantization_config", None)
    if not is_bnb(wanted) and not is_bnb(stored):
        return kwargs
    kwargs["config"] = config = copy.deepcopy(config)
    if is_bnb(wanted):
        kwargs["quantization_config"] = BnbLoadingConfig.of(wanted)
        if is_fp8(stored):
            del config.quantization_config
    if is_bnb(stored):
        config.quantization_config = BnbLoadingConfig.of(stored)
    return kwargs
