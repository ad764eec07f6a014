"""A checkpoint held against the configuration and the model that it is to fill, before a weight is read.

Special about it: a wrong size in config.json is met while nothing is built or allocated from it, and named with the
file and the tensor that say otherwise. Where tensors are missing one by one, transformers' report tells.
"""

import re
from collections import Counter
from collections.abc import Container
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from ..conversion.errors import CheckpointError
from ..conversion.reader import CONFIG_NAME, open_weights, read_config
from .stored import CheckpointTensors

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.", re.ASCII)
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,9})\.(gate|up|down)_proj\.weight(_scale_inv)?", re.ASCII)
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0")
_CONFIG = "use the config.json that came with the weights"


def check_folder(folder: str, layers: Any = None) -> None:
    """Check the files of a folder against each other, and that they hold all decoder layers that are asked for.

    Args:
        folder: what `from_pretrained` is given; without safetensors in it nothing is checked.
        layers: the number of decoder layers that the model will have; None for what config.json says.

    Raises:
        CheckpointError: see `open_weights`; a layer of which the files hold nothing.
    """
    found = open_weights(Path(folder))
    if found is None:
        return
    stored = {int(match[1]) for name in found.tensors if (match := _LAYER.search(name))}
    layers = read_config(Path(folder)).get("num_hidden_layers") if layers is None else layers
    first = next(layer for layer in count() if layer not in stored)
    if stored and isinstance(layers, int) and first < layers:
        problem = f"num_hidden_layers is {layers}, and the files hold nothing of layer {first}"
        raise CheckpointError(problem, file=Path(folder) / CONFIG_NAME, remedy=_CONFIG)


def check_fit(model: nn.Module, tensors: CheckpointTensors, *, resize: bool = False) -> None:
    """Hold the shapes and dtypes of the files against a model that is still without memory.

    Args:
        model: what is to be filled.
        tensors: the files' tensors; those that the model does not have are passed over.
        resize: leave tensors of another shape to transformers (`ignore_mismatched_sizes`), experts excepted.

    Raises:
        CheckpointError: names the first tensor that does not fit.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    experts = Counter[tuple[str, str]]()
    for name in tensors:
        match = _EXPERT.fullmatch(name)
        owner = match and name_in(model, wanted, f"{match[1]}.{_stack(match)}")
        if match and owner:
            shape, fixed = _expert_shape(match, wanted[owner]), True
            experts[owner, match[3]] += int(match[2]) < wanted[owner][0]
        else:
            place = name_in(model, wanted, name)
            if place is None:
                continue
            shape, fixed = wanted[place], False
        found = tensors.shape(name)
        if found != shape and (fixed or not resize):
            problem = f"shape {list(found)}, config.json asks for {list(shape)}"
            raise CheckpointError(problem, file=tensors.file(name), tensor=name, remedy=_CONFIG)
        if tensors.dtype(name) not in _NUMBERS and not tensors.dtype(name).startswith("F8"):
            problem, remedy = f"dtype {tensors.dtype(name)} is no weight's", "download the checkpoint again"
            raise CheckpointError(problem, file=tensors.file(name), tensor=name, remedy=remedy)
    for (owner, part), number in experts.items():
        if number != wanted[owner][0]:
            problem = f"the files hold {number} of the {wanted[owner][0]} {part}_proj that config.json asks for"
            remedy = "download the missing shard, or correct n_routed_experts"
            raise CheckpointError(problem, tensor=owner, remedy=remedy)


def _stack(match: re.Match[str]) -> str:
    """The fused parameter that an expert's tensor goes into."""
    return ("down_proj" if match[3] == "down" else "gate_up_proj") + (match[4] or "")


def _expert_shape(match: re.Match[str], fused: tuple[int, ...]) -> tuple[int, int]:
    return fused[1] if match[3] == "down" else fused[1] // 2, fused[2]


def name_in(model: Any, wanted: Container[str], name: str) -> str | None:
    """The model's name of a stored tensor: a base model may be filled from a causal LM's folder and the reverse."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in wanted), None)
