"""Loading and saving in the official layout: split experts, MTP modules with their copies of embedding and head.

Special about it: routed experts are fused in memory and per expert on disk, through transformers' weight converters;
a checkpoint without MTP weights gives a model without MTP modules, never one with random ones.
"""

import copy
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import logging

from ..quantization import (
    FP8Config,
    Weights,
    bnb_arguments,
    check_folder,
    dequantized_state_dict,
    is_fp8,
    keeps_fp8,
    load_streamed,
    requested_config,
    requesting,
    save_official,
    stack_shapes,
    streams,
)

logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What PEFT calls the model that it wraps.
_UNDER_ADAPTERS = "base_model.model."


def expert_converters() -> list[WeightConverter]:
    """Per-expert official names to the fused parameters (and scales, of experts kept in FP8), and back on saving."""
    return [converter for suffix in ("", "_scale_inv") for converter in _expert_converters(suffix)]


def _expert_converters(suffix: str) -> list[WeightConverter]:
    return [
        WeightConverter(
            source_patterns=[f"mlp.experts.*.{name}_proj.weight{suffix}" for name in ("gate", "up")],
            target_patterns=f"mlp.experts.gate_up_proj{suffix}",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"mlp.experts.*.down_proj.weight{suffix}",
            target_patterns=f"mlp.experts.down_proj{suffix}",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register_converters(model_types: tuple[str, ...]) -> None:
    """transformers applies no conversion to classes outside of its tree unless it is registered; without it the
    experts would be random behind a load report."""
    for model_type in model_types:
        register_checkpoint_conversion_mapping(model_type, [*expert_converters()], overwrite=True)


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of every class of this package."""

    config: Any

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel must not broadcast, by its names in the model and in PEFT's wrapper."""
        names = stack_shapes(cast(Any, self))
        return [prefix + name for name in names for prefix in ("", _UNDER_ADAPTERS)]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a folder that names these classes in its auto_map imports this package, and saving must not copy
        the package's files into the folder, as transformers does for code that came with a checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for official (FP8 or BF16), transformers-saved and Trainer-saved folders.

        Args:
            quantization_config: an `FP8Config` says what becomes of FP8 weights; a `BitsAndBytesConfig` packs the
                linears and the routed experts of any of these folders.

        Raises:
            CheckpointError: a `ValueError` that names file, tensor and remedy: damaged files, an index or a link that
                leaves the folder, a shard that is missing, tensors that contradict the configuration.
            ValueError: FP8 weights without scales that fit, or of another kind.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if os.path.isdir(folder) and not kwargs.get("variant"):
                layers = getattr(kwargs.get("config"), "num_hidden_layers", kwargs.get("num_hidden_layers"))
                check_folder(folder, layers)
        wanted = requested_config(kwargs.pop("quantization_config", None))
        if wanted is not None and not isinstance(wanted, FP8Config):
            kwargs["quantization_config"] = wanted
        kwargs = bnb_arguments(cls.config_class, pretrained_model_name_or_path, kwargs)  # type: ignore[attr-defined]
        with requesting(wanted):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        from transformers.modeling_utils import PreTrainedModel

        loader = PreTrainedModel._load_pretrained_model
        return load_streamed(loader, model, state_dict, checkpoint_files, load_config, expected_keys)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        from transformers.modeling_utils import PreTrainedModel

        _settle_mtp(model, loading_info)
        # Saving always writes the official names, also where the folder that was read had the fused ones.
        model._weight_conversions = None
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in torch, for own and official names; FP8 weights are dequantised where the model keeps none.

        Raises:
            ValueError: FP8 codes without their scale, for a weight that the model does not keep in FP8.
        """
        return super().load_state_dict(dequantized_state_dict(self, state_dict), *args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if prefix == _UNDER_ADAPTERS:
            rest[4].extend(_lost_adapters(cast(Any, self), state_dict))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        state_dict: Any = None,
        quantize: str | None = None,
        scale_fmt: str | None = None,
        original: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with the official names, MTP modules and their copies of embedding and head included.

        FP8 weights that were kept are written back bit for bit. Whole models on one process are written tensor by
        tensor, in files of at most `max_shard_size` (5GB), all of which get their names at the end.

        Args:
            quantize: "fp8" writes the official FP8 layout: E4M3 codes in 128 x 128 blocks, the rest BF16.
            scale_fmt: with `quantize`, None for float32 scales or "ue8m0" for powers of two.
            original: with `quantize`, the folder of the checkpoint that this model was fine-tuned from: weights that
                are still what it holds keep its codes, if it holds codes, and what rounding did to the changes of the
                others is logged and lies in `rounding_report` afterwards.

        Raises:
            ValueError: another `quantize` or `scale_fmt`; weights that are not finite; kept codes whose scales
                `scale_fmt` cannot hold; `quantize` for a model with adapters, or for one spread over processes.
        """
        save, model = super().save_pretrained, cast(Any, self)  # type: ignore[misc]
        _drop_local_code(self.config)
        asked = {"quantize": quantize, "scale_fmt": scale_fmt, "original": original}
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        whole = model.state_dict() if state_dict is None else state_dict
        weights = Weights(
            whole,
            lambda name: load_offloaded_parameter(model, name),
            copies=_mtp_copies(self, whole),
            tied=getattr(self, "all_tied_weights_keys", None) or (),
        )
        if not adapters and not keeps_fp8(model) and is_fp8(getattr(self.config, "quantization_config", None)):
            del self.config.quantization_config
        fp8 = any(value is not None for value in asked.values())
        if fp8 or (not adapters and not args and streams(model, weights, kwargs)):
            return save_official(self, save_directory, weights, *args, **asked, **kwargs)
        if not adapters:
            state_dict = _with_mtp_copies(self, state_dict)
            self._hand_over(state_dict)
        return save(save_directory, *args, state_dict=state_dict, **kwargs)

    def _hand_over(self, state_dict: Any) -> None:
        """transformers takes a quantised model's tensors from its quantiser and from nowhere else."""
        model = cast(Any, self)
        if keeps_fp8(model):
            model.hf_quantizer.state_dict_to_save = state_dict


def _drop_local_code(config: Any) -> None:
    """Take out of auto_map what lies beside the config.json that was read, and will not lie beside the new one."""
    auto_map = {key: name for key, name in (getattr(config, "auto_map", None) or {}).items() if "--" in str(name)}
    if auto_map:
        config.auto_map = auto_map
    elif hasattr(config, "auto_map"):
        del config.auto_map


def _lost_adapters(model: Any, names: Iterable[str]) -> list[str]:
    """An error where an adapter's file holds weights for what this base has not; PEFT would pass over them in silence.

    Layers behind the last may be MTP modules that were not loaded: they are left out with a word.
    """
    known = {_UNDER_ADAPTERS + name for name, _ in model.named_parameters()}
    lost = [name.removeprefix(_UNDER_ADAPTERS) for name in names if ".lora_" in name and name not in known]
    layers = {name: match for name in lost if (match := _LAYER.search(name))}
    behind = {name for name, match in layers.items() if int(match[1]) >= model.config.num_hidden_layers}
    if behind:
        logger.warning(
            f"{len(behind)} weights of the adapter are left out: they are for MTP modules that were not loaded, or "
            f"for a deeper base ({min(behind)})."
        )
    lost = sorted(set(lost) - behind)
    if not lost:
        return []
    return [f"the adapter is of another base: it has {len(lost)} weights for what is not here, the first is {lost[0]}"]


def _settle_mtp(model: Any, loading_info: Any) -> None:
    """Drop the MTP modules that the checkpoint does not hold, and pass over those that the model does not have."""
    config, base = model.config, model.base_model
    first = config.num_hidden_layers
    names = set(model.state_dict())
    expected = {name for name in names if _layer_of(name) >= first}
    # Where nothing at all was loaded there is no checkpoint, and every weight is meant to be a new one.
    if expected and expected <= loading_info.missing_keys and not names <= loading_info.missing_keys:
        logger.warning(
            "The checkpoint holds no MTP weights although its config says num_nextn_predict_layers = "
            f"{config.num_nextn_predict_layers} (transformers' own class drops them on saving). The model has no MTP "
            "modules, and its config now says 0."
        )
        base.layers = base.layers[:first]
        config.num_nextn_predict_layers = 0
        loading_info.missing_keys -= expected
    beyond = first + (config.num_nextn_predict_layers or 0)
    loading_info.unexpected_keys -= {name for name in loading_info.unexpected_keys if _layer_of(name) >= beyond}


def _layer_of(name: str) -> int:
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def _mtp_copies(model: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The official files store embedding and head again in each MTP module: name there -> name in `state_dict`."""
    config = model.config
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if embedding not in state_dict or model.get_output_embeddings() is None:
        return {}
    if head not in state_dict:  # tied
        head = embedding
    copied = {"embed_tokens.weight": embedding, "shared_head.head.weight": head}
    depths = range(config.num_hidden_layers, config.num_hidden_layers + (config.num_nextn_predict_layers or 0))
    return {f"model.layers.{layer}.{name}": source for layer in depths for name, source in copied.items()}


def _with_mtp_copies(model: Any, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    if not model.config.num_nextn_predict_layers:
        return state_dict
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for name, source in _mtp_copies(model, state_dict).items():
        tensor = state_dict[source]
        tensor = load_offloaded_parameter(model, source) if tensor.device.type == "meta" else tensor
        state_dict[name] = tensor.detach().clone()
    return state_dict


def without_mtp(config: Any) -> Any:
    """A copy of `config` for a model that has no use for MTP modules."""
    config = copy.deepcopy(config)
    config.num_nextn_predict_layers = 0
    return config
