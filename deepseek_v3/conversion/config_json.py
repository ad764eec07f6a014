"""What becomes of config.json when a checkpoint changes its layout."""

from typing import Any

from .errors import CheckpointError

_FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
REMOTE_MODULE = "remote_deepseek_v3"
REMOTE_SOURCE = """\
# pip install deepseek-v3-transformers: this checkpoint's classes are that package's.
from deepseek_v3 import {names}  # noqa: F401
"""


def block_quantization(config: dict[str, Any], quantized: bool, file: Any) -> dict[str, Any] | None:
    """The quantization_config of a config.json, once it is sure that it agrees with the tensors.

    Raises:
        CheckpointError: it announces FP8 and there is none, or the reverse, or another kind of quantisation.
    """
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise CheckpointError("quantization_config is no object", file=file, remedy="take the original config.json")
    if found and not quantized:
        problem = "announces a quantization_config, and the files hold no FP8 weights"
        raise CheckpointError(problem, file=file, remedy="remove quantization_config")
    if not quantized:
        return None
    if not found:
        problem = "has no quantization_config, and the files hold FP8 weights"
        raise CheckpointError(problem, file=file, remedy=f"add {_FP8_CONFIG}")
    method, block = found.get("quant_method"), found.get("weight_block_size")
    if method != "fp8" or block != [128, 128] or found.get("fmt", "e4m3") != "e4m3":
        problem = f"quantization_config is {str(method)[:40]!r} with blocks {str(block)[:40]}"
        raise CheckpointError(problem, file=file, remedy="only E4M3 FP8 in 128x128 blocks is converted")
    if found.get("scale_fmt") not in (None, "ue8m0"):
        problem = f"scale_fmt is {str(found['scale_fmt'])[:40]!r}"
        raise CheckpointError(problem, file=file, remedy="only float32 scales and 'ue8m0' are known")
    return found


def converted_config(raw: dict[str, Any], view: Any, to: str, scale_fmt: str | None) -> dict[str, Any]:
    """config.json of the result: dtype, quantization_config and MTP count that are true of it, no foreign code.

    Args:
        raw: the source's config.json.
        view: what the conversion knows of it, with the number of MTP modules that are really there.
        to: "fp8", or any name for BF16.
        scale_fmt: "ue8m0" if the scales were just made powers of two.
    """
    config = {key: value for key, value in raw.items() if key not in ("auto_map", "quantization_config")}
    # transformers 5 writes `dtype`, older readers know `torch_dtype`; two that differ would be a trap.
    config["torch_dtype"] = "bfloat16"
    if "dtype" in config:
        config["dtype"] = "bfloat16"
    if view.num_nextn_predict_layers != raw.get("num_nextn_predict_layers", 0):
        config["num_nextn_predict_layers"] = view.num_nextn_predict_layers
    if to == "fp8":
        config["quantization_config"] = {**_FP8_CONFIG, **(raw.get("quantization_config") or {})}
        if scale_fmt is not None:
            config["quantization_config"]["scale_fmt"] = scale_fmt
    return config


def remote_code(config: dict[str, Any]) -> tuple[dict[str, str], str]:
    """auto_map for tools that only know trust_remote_code, and the source of the module that it points to."""
    config_class = "KimiK2Config" if config.get("model_type") == "kimi_k2" else "DeepseekV3Config"
    classes = {
        "AutoConfig": config_class,
        "AutoModel": "DeepseekV3Model",
        "AutoModelForCausalLM": "DeepseekV3ForCausalLM",
    }
    auto_map = {auto: f"{REMOTE_MODULE}.{name}" for auto, name in classes.items()}
    return auto_map, REMOTE_SOURCE.format(names=", ".join(classes.values()))
