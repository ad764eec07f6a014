"""Loading and saving in the official layout: split experts, MTP modules with their copies of embedding and head.

Special about it: routed experts are fused in memory and per expert on disk, through transformers' weight converters;
a checkpoint without MTP weights gives a model without MTP modules, never one with random ones.
"""

import copy
import json
import os
import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def expert_converters() -> list[WeightConverter]:
    """Per-expert official names to the fused parameters, and back on saving."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for official, transformers-saved and Trainer-saved folders, after `check_index`."""
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            check_index(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        from transformers.modeling_utils import PreTrainedModel

        _settle_mtp(model, loading_info)
        # Saving always writes the official names, also where the folder that was read had the fused ones.
        model._weight_conversions = None
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with the official names, MTP modules and their copies of embedding and head included."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = _with_mtp_copies(self, state_dict)
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)  # type: ignore[misc]


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
