"""Loading and saving in the official layout: split experts, MTP modules with their copies of embedding and head.

Special about it: routed experts are fused in memory and per expert on disk, through transformers' weight converters;
a checkpoint without MTP weights gives a model without MTP modules, never one with random ones.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..quantization import (
    FP8Config,
    dequantized_state_dict,
    is_fp8,
    keeps_fp8,
    load_streamed,
    quantized_state_dict,
    requested_config,
    requesting,
)

logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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


def check_index(folder: str) -> None:
    """Refuse an index that names what is no file of `folder`.

    Raises:
        ValueError: a name that is not a plain file name.
        FileNotFoundError: a shard that is not there.
    """
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.isfile(index):
        return
    with open(index, encoding="utf-8") as file:
        try:
            weight_map = json.load(file)["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no checkpoint index ({error!r}); download it again") from error
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise ValueError(
                f"{index} names {shard!r}, which is no plain file name inside the folder; do not trust it"
            )
        if not os.path.isfile(os.path.join(folder, shard)):
            tensors = sum(name == shard for name in weight_map.values())
            raise FileNotFoundError(
                f"{index} names {shard}, which is missing from {folder} ({tensors} tensors); download that shard again"
            )


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of every class of this package."""

    config: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a folder that names these classes in its auto_map imports this package, and saving must not copy
        the package's files into the folder, as transformers does for code that came with a checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for official (FP8 or BF16), transformers-saved and Trainer-saved folders.

        Args:
            quantization_config: an `FP8Config` says what becomes of FP8 weights.

        Raises:
            ValueError: an index that leaves its folder; FP8 weights without scales that fit, or of another kind.
            FileNotFoundError: a shard that is missing.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            check_index(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        wanted = requested_config(kwargs.pop("quantization_config", None))
        if wanted is not None and not isinstance(wanted, FP8Config):
            kwargs["quantization_config"] = wanted
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

        FP8 weights that were kept are written back bit for bit.

        Args:
            quantize: "fp8" writes the official FP8 layout: E4M3 codes in 128 x 128 blocks, the rest BF16.
            scale_fmt: with `quantize`, None for float32 scales or "ue8m0" for powers of two.
            original: with `quantize`, the folder of the FP8 checkpoint that this model was fine-tuned from: weights
                that are still what it holds keep its codes, and what rounding does to the others is reported.

        Raises:
            ValueError: another `quantize` or `scale_fmt`; weights that are not finite; kept codes whose scales
                `scale_fmt` cannot hold; `quantize` for a model with adapters, or together with `push_to_hub`.
        """
        save, model = super().save_pretrained, cast(Any, self)  # type: ignore[misc]
        if quantize is not None or scale_fmt is not None or original is not None:
            _check_quantize(self, quantize, scale_fmt, kwargs)
            state_dict = quantized_state_dict(
                cast(dict, _with_mtp_copies(self, state_dict or model.state_dict())),
                self.config,
                scale_fmt=scale_fmt,
                fetch=lambda name: load_offloaded_parameter(model, name),
                tied=getattr(self, "all_tied_weights_keys", None) or (),
                original=None if original is None else os.fspath(original),
            )
            with _described_as(self.config, FP8Config(scale_fmt=scale_fmt)):
                self._hand_over(state_dict)
                result = save(save_directory, *args, state_dict=state_dict, **kwargs)
                written = copy.deepcopy(self.config)
                written.dtype = "bfloat16"
                written.save_pretrained(save_directory)
            return result
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = _with_mtp_copies(self, state_dict)
            self._hand_over(state_dict)
            if not keeps_fp8(model) and is_fp8(getattr(self.config, "quantization_config", None)):
                del self.config.quantization_config
        return save(save_directory, *args, state_dict=state_dict, **kwargs)

    def _hand_over(self, state_dict: Any) -> None:
        """transformers takes a quantised model's tensors from its quantiser and from nowhere else."""
        model = cast(Any, self)
        if keeps_fp8(model):
            model.hf_quantizer.state_dict_to_save = state_dict


def _check_quantize(model: Any, quantize: str | None, scale_fmt: str | None, kwargs: dict) -> None:
    if quantize != "fp8":
        raise ValueError(f"quantize={quantize!r}: only 'fp8' can be written; scale_fmt and original go with it")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt={scale_fmt!r}: choose None (float32 scales) or 'ue8m0' (powers of two)")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("quantize='fp8' writes whole models; merge the adapters first")
    if kwargs.get("push_to_hub"):
        raise ValueError("quantize='fp8' writes a folder; upload that folder afterwards")


@contextmanager
def _described_as(config: Any, quantization: FP8Config) -> Iterator[None]:
    """`config` with another quantization_config for the time of saving."""
    before = config.__dict__.get("quantization_config")
    config.quantization_config = quantization
    try:
        yield
    finally:
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before


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


def _with_mtp_copies(model: Any, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    config = model.config
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not config.num_nextn_predict_layers or model.get_output_embeddings() is None:
        return state_dict
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    if embedding not in state_dict:
        return state_dict
    if head not in state_dict:  # tied
        head = embedding
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        for source, copied in ((embedding, "embed_tokens.weight"), (head, "shared_head.head.weight")):
            tensor = state_dict[source]
            tensor = load_offloaded_parameter(model, source) if tensor.device.type == "meta" else tensor
            state_dict[f"{prefix}.{copied}"] = tensor.detach().clone()
    return state_dict


def without_mtp(config: Any) -> Any:
    """A copy of `config` for a model that has no use for MTP modules."""
    config = copy.deepcopy(config)
    config.num_nextn_predict_layers = 0
    return config
