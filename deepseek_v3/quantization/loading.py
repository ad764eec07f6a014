"""Feeding transformers' loader one tensor at a time, so that loading needs the model's memory and little beside.

Special about it: transformers reads every expert's tensors ahead and then stacks and joins them, two copies of a
layer and as many layers ahead as the disk is faster than the copies. Here an expert's tensor is read, and where asked
dequantised, straight into its place in the fused parameter; a stack of files that are fused already is read in the
same way, expert by expert.

Letters: E routed experts, F expert width, D hidden.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .bnb_experts import BnbExperts
from .bnb_quantizer import PacksExperts, pack
from .config import FP8Config, request
from .fitting import check_fit, name_in
from .offload import READERS, OffloadedStacks
from .quantizer import DeepseekFP8Quantizer
from .stored import SCALE_SUFFIX, TORCH_DTYPES, CheckpointTensors, Deferred, DequantizedTensor, StoredTensor

_EXPERTS = "mlp.experts."
_STACK = re.compile(rf"{re.escape(_EXPERTS)}(gate_up|down)_proj({SCALE_SUFFIX})?$")


class FuseExperts(ConversionOps):
    """Per-expert tensors into one [E, rows, columns] parameter, the parts (gate, up, or both) one below the other."""

    def __init__(self, errors: list[ValueError], offloaded: OffloadedStacks) -> None:
        self.errors, self.offloaded = errors, offloaded

    def __deepcopy__(self, memo: Any) -> "FuseExperts":
        # transformers copies a converter for each layer; what goes wrong is collected in one list.
        return self

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[Any]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: Any,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        try:
            parts = [input_dict.pop(pattern, []) for pattern in source_patterns]
            like = model.get_parameter_or_buffer(full_layer_name)
            if self.offloaded.takes(full_layer_name):
                missing_keys.discard(full_layer_name)
                rows = Rows(parts, _part_shape(parts, like))
                if self.offloaded.in_files and parts[0][0].stored.expert is not None:
                    _check_in_place(rows, full_layer_name)
                else:
                    self.offloaded.write(full_layer_name, like.shape, _dtype(parts), rows.__getitem__)
                return {}
            return {target_patterns[0]: _fuse(parts, like)}
        except ValueError as error:
            self.errors.append(error)
            raise


class PackExperts(FuseExperts):
    """The same into the codes of a module that bitsandbytes packs, one expert after the other."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[Any]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: Any,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        owner, _, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(owner)
        if not isinstance(experts, BnbExperts):
            kwargs["missing_keys"] = missing_keys
            return super().convert(input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs)
        try:
            parts = [input_dict.pop(pattern, []) for pattern in source_patterns]
            pack(experts, name, parts[0][0].device, Rows(parts, _part_shape(parts, getattr(experts, name))))
        except ValueError as error:
            self.errors.append(error)
            raise
        missing_keys.discard(full_layer_name)
        return {}


class Rows:
    """Per-expert tensors, the parts of each one below the other, read when an expert is asked for."""

    def __init__(self, parts: list[list[Deferred]], shape: list[int]) -> None:
        self.parts, self.shape = parts, shape

    def __getitem__(self, expert: int) -> torch.Tensor:
        return torch.cat([tensors[expert].read() for tensors in self.parts])


def _part_shape(parts: list[list[Deferred]], like: torch.Tensor) -> list[int]:
    """Rows and columns of one expert's tensor of each part; `check_fit` has seen that all are there."""
    return [like.shape[1] // len(parts), like.shape[2]]


def _check_in_place(rows: Rows, name: str) -> None:
    """A stack that accelerate will read from the checkpoint's own file: scales are looked at, nothing is copied."""
    if name.endswith(SCALE_SUFFIX):
        for expert in range(len(rows.parts[0])):
            rows[expert]


def _dtype(parts: list[list[Deferred]]) -> torch.dtype:
    """What the stack is made of: scales stay float32 whatever the model is cast to."""
    first = parts[0][0]
    if first.stored.name.endswith(SCALE_SUFFIX):
        return torch.float32
    return first.dtype or TORCH_DTYPES[first.get_dtype()]


def _fuse(parts: list[list[Deferred]], like: torch.Tensor) -> torch.Tensor:
    rows, _ = _part_shape(parts, like)
    with torch.inference_mode(False):  # which threads would not be in, and could not write to what it makes
        fused = torch.empty(like.shape, dtype=_dtype(parts), device=parts[0][0].device)

    def place(part: int, expert: int) -> None:
        fused[expert, part * rows : (part + 1) * rows].copy_(parts[part][expert].read())

    with ThreadPoolExecutor(READERS) as pool:
        jobs = [pool.submit(place, part, expert) for part in range(len(parts)) for expert in range(like.shape[0])]
        for job in jobs:
            job.result()
    return fused


def _streamed(
    model: Any, checkpoint: CheckpointTensors, dequantized: set[str], load_config: Any, fuse: FuseExperts
) -> tuple[dict[str, Any], Any]:
    """The state dict and the `LoadStateDictConfig` to hand to transformers' loader.

    Args:
        model: what is to be filled.
        checkpoint: the files.
        dequantized: names of the FP8 weights that the model wants without their scales.
        load_config: transformers', whose converters of experts are replaced in the copy that is returned.
        fuse: what the experts' tensors are read by. What it raises is collected in its `errors`, since the loader
            only reports it.
    """
    mapping, readers = [], []
    for entry in load_config.weight_mapping or []:
        if isinstance(entry, WeightConverter) and _EXPERTS in entry.target_patterns[0]:
            targets = entry._original_target_patterns
            stacked = [targets[0].replace(_EXPERTS, f"{_EXPERTS}*.stacked.")]
            ours = [entry.copy(s, targets, operations=[fuse]) for s in (entry._original_source_patterns, stacked)]
            readers += ours
            mapping += ours
        else:
            mapping.append(entry)
    state_dict: dict[str, Any] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in checkpoint:
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in dequantized:
            continue
        kind = DequantizedTensor if name in dequantized else StoredTensor
        # Another shape, or a stack that the model does not have, is transformers' business, or nobody's.
        if _STACK.search(name) and shapes.get(name_in(model, shapes, name) or "") == checkpoint.shape(name):
            before, after = name.split(_EXPERTS)
            for expert in range(checkpoint.shape(name)[0]):
                state_dict[f"{before}{_EXPERTS}{expert}.stacked.{after}"] = Deferred(kind(checkpoint, name, expert))
            continue
        stored = kind(checkpoint, name)
        fused = any(entry.rename_source_key(name)[1] is not None for entry in readers)
        state_dict[name] = Deferred(stored) if fused else stored
    return state_dict, replace(load_config, weight_mapping=mapping)


def load_streamed(
    loader: Callable, model: Any, state_dict: Any, files: list[str] | None, load_config: Any, expected_keys: Any
) -> Any:
    """`PreTrainedModel._load_pretrained_model` over tensors that are read one at a time, FP8 ones with their scales.

    Raises:
        ValueError: FP8 weights that config.json does not announce, that do not come from safetensors files, or that
            are to be spread over devices by a parallel plan; tensors that do not fit the model; FP8 asked of BF16
            files.
    """
    quantizer, wanted = load_config.hf_quantizer, request()
    fp8 = isinstance(quantizer, DeepseekFP8Quantizer)
    if wanted is not None and wanted.keep and not (fp8 and quantizer.codes):
        raise ValueError(
            "FP8Config(keep=True): the checkpoint holds no FP8 weights that its config.json announces. Write one with "
            "save_pretrained(folder, quantize='fp8'), or load it without"
        )
    safetensors = state_dict is None and bool(files) and files[0].endswith(".safetensors")  # type: ignore[index]
    spread = load_config.device_mesh is not None
    packs = isinstance(quantizer, PacksExperts) and not quantizer.pre_quantized
    foreign = quantizer is not None and not fp8 and not packs
    if fp8 and quantizer.codes and (spread or not safetensors):
        why = "a parallel plan splits tensors" if spread else "its weights are no safetensors files"
        raise ValueError(f"the checkpoint is FP8 and {why}. Convert it to BF16 first: deepseek-v3 convert --to bf16")
    if not safetensors or foreign or spread or (is_deepspeed_zero3_enabled() and quantizer is None):
        return loader(model, state_dict, files, load_config, expected_keys)
    checkpoint = quantizer.checkpoint if fp8 else CheckpointTensors(files or [])
    codes = quantizer.dequantized if fp8 else checkpoint.fp8_weights()
    if codes and quantizer is None:
        raise ValueError(
            f"{min(codes)} and {len(codes) - 1} other weights are FP8 and config.json has no quantization_config. "
            f"Add this to it: {json.dumps(FP8Config().to_dict())}"
        )
    check_fit(model, checkpoint, resize=load_config.ignore_mismatched_sizes)
    errors: list[ValueError] = []
    # Where a tensor is not what the file holds, an offloaded one must not be read from that file.
    in_files = None if codes else files
    offloaded = OffloadedStacks(load_config.device_map, load_config.disk_offload_folder, in_files=bool(in_files))
    fuse = (PackExperts if packs else FuseExperts)(errors, offloaded)
    tensors, load_config = _streamed(model, checkpoint, codes, load_config, fuse)
    try:
        info, index = loader(model, tensors, in_files, load_config, expected_keys)
    except Exception as error:
        # The loader goes on after a converter's error and may stumble over what comes of it.
        if errors:
            raise errors[0] from error
        raise
    finally:
        checkpoint.close()
    if errors:
        raise errors[0]
    return info, {**index, **offloaded.index} if offloaded.index else index
