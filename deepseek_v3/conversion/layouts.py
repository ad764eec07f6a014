"""Any stored layout seen as the official one: official name -> view of the stored bytes, checked against the config.

Letters: E routed experts, F expert width, D hidden size.
"""

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from deepseek_v3.configuration.accounting import part_of as main_part_of
from deepseek_v3.configuration.layout import TensorSpec, official_tensors

from .errors import CheckpointError
from .inference_names import placement
from .reader import CONFIG_NAME, Checkpoint
from .views import View, join, view_of, window

# What may stand in a file for each kind of tensor; what is not the first of its row is widened, exactly.
DTYPES = {"fp8": ("F8_E4M3",), "scale": ("F32", "F8_E8M0"), "bf16": ("BF16",), "f32": ("F32", "BF16")}
SCALE_SUFFIX = "_scale_inv"
_MAX_TENSORS = 4_000_000
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.", re.ASCII)
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "first_k_dense_replace",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)
_OPTIONAL = {"n_shared_experts": 0, "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "q_lora_rank": None}


def config_view(config: dict[str, Any], file: Any) -> SimpleNamespace:
    """A config.json as an object with attributes, its sizes checked before anything is built from them.

    Raises:
        CheckpointError: a size is missing, is no whole number or is absurd.
    """
    values = {**_OPTIONAL, **config}
    for field in (*_NEEDED, *_OPTIONAL):
        value = values.get(field)
        if value is None and field in _OPTIONAL:
            values[field] = _OPTIONAL[field]
            continue
        least = 0 if field in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers") else 1
        if type(value) is not int or not least <= value < 1 << 31:
            problem = f"{field} is {str(value)[:40]}, a whole number of at least {least} is needed"
            raise CheckpointError(problem, file=file, remedy="use the config.json that came with the weights")
    layers = values["num_hidden_layers"] + values["num_nextn_predict_layers"]
    if layers * (6 * values["n_routed_experts"] + 40) > _MAX_TENSORS:
        problem = f"{layers} layers of {values['n_routed_experts']} experts are no known model's size"
        raise CheckpointError(problem, file=file, remedy="use the config.json that came with the weights")
    return SimpleNamespace(**values)


def layer_of(name: str) -> int:
    """The number of the decoder layer that an official tensor belongs to, -1 for none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def is_mtp(name: str, config: Any) -> bool:
    """Whether an official tensor belongs to a Multi-Token Prediction module."""
    return layer_of(name) >= config.num_hidden_layers


def mtp_layers(names: Iterable[str]) -> list[int]:
    """The layers that are MTP modules, told by the norm that only they have."""
    return sorted({layer_of(name) for name in names if name.endswith(".enorm.weight")} - {-1})


def part_of(name: str, first_mtp: float) -> str:
    """The part of the model that an official tensor belongs to, under the names that `account` uses."""
    if layer_of(name) >= first_mtp:
        return "mtp"
    return main_part_of(name)


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    """How many stored tensors there are of each dtype."""
    counts: dict[str, int] = {}
    for header in checkpoint.files.values():
        for info in header.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    return counts


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether any tensor holds FP8 codes."""
    return "F8_E4M3" in stored_dtypes(checkpoint)


def official_views(checkpoint: Checkpoint, config: Any) -> dict[str, View]:
    """Every stored tensor under its official name(s). Names that no layout knows stay as they are.

    Raises:
        CheckpointError: ranks or fused experts whose shapes contradict each other or the configuration.
    """
    if checkpoint.layout == "inference":
        return _from_ranks(checkpoint, config)
    views: dict[str, View] = {}
    for name, info in checkpoint.tensors.items():
        if name.removesuffix(SCALE_SUFFIX).endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
            views.update(_split_experts(name, view_of(info), info.file))
        else:
            views[name] = view_of(info)
    return views


def _split_experts(name: str, stacked: View, file: str) -> Iterable[tuple[str, View]]:
    """[E, 2F, D] or [E, D, F] -> the official matrices of each expert; the same for their scales."""
    prefix, kind = name.removesuffix(SCALE_SUFFIX).rsplit(".", 1)
    suffix = SCALE_SUFFIX if name.endswith(SCALE_SUFFIX) else ""
    halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    # An empty tensor may claim any number of experts, and each would become a view.
    if (
        len(stacked.shape) != 3
        or stacked.shape[1] % len(halves)
        or not 0 < stacked.nbytes
        or stacked.shape[0] > 1 << 16
    ):
        problem = f"shape {list(stacked.shape)} is not [experts, rows, columns] of fused experts"
        raise CheckpointError(problem, file=file, tensor=name, remedy="save the model again")
    experts, rows, columns = stacked.shape
    height = rows // len(halves)
    for expert in range(experts):
        for half, matrix in enumerate(halves):
            begin = expert * rows + half * height
            official = f"{prefix}.{expert}.{matrix}.weight{suffix}"
            yield official, window(stacked, 0, begin, begin + height, (height, columns))


def _from_ranks(checkpoint: Checkpoint, config: Any) -> dict[str, View]:
    ranks, size = checkpoint.ranks, len(checkpoint.ranks)
    if config.n_routed_experts % size:
        problem = f"{config.n_routed_experts} experts cannot lie on {size} ranks"
        raise CheckpointError(problem, file=checkpoint.folder / CONFIG_NAME, remedy="use the matching config.json")
    used: set[str] = set()
    views: dict[str, View] = {}
    quantized = is_quantized(checkpoint)
    for spec in official_tensors(config, quantized=quantized):
        where = placement(spec.name)
        used.add(where.name)
        if where.expert is not None:
            owners = ranks[where.expert // (config.n_routed_experts // size)]
            if where.name in owners:
                views[spec.name] = view_of(owners[where.name])
            continue
        holders = [tensors[where.name] for tensors in ranks if where.name in tensors]
        if not holders:
            continue
        if len(holders) != size or any(i.shape != holders[0].shape or i.dtype != holders[0].dtype for i in holders):
            problem = f"is missing from a rank, or differs in shape or dtype between the {size} ranks"
            raise CheckpointError(problem, file=checkpoint.folder, tensor=where.name, remedy="shard the model again")
        parts = [view_of(info) for info in holders]
        views[spec.name] = parts[0] if where.axis is None else join(parts, where.axis)
    for tensors in ranks:
        for name in tensors.keys() - used:
            views[name] = view_of(tensors[name])
    return views


def check_views(
    views: dict[str, View], specs: list[TensorSpec], folder: Any, *, drop_unknown: bool = False
) -> dict[str, View]:
    """Hold views against the tensors that the configuration asks for; give those views back, in that order.

    Raises:
        CheckpointError: one is missing, is unknown, or has another shape or dtype.
    """
    wanted = {spec.name for spec in specs}
    for spec in specs:
        view = views.get(spec.name)
        if view is None:
            what = "the scale of this matrix is missing" if spec.kind == "scale" else "is missing"
            remedy = "download the checkpoint again, or correct config.json"
            raise CheckpointError(what, file=folder, tensor=spec.name, remedy=remedy)
        file = view.tiles[0].file if view.tiles else folder
        if tuple(view.shape) != tuple(spec.shape):
            problem = f"shape {list(view.shape)}, config.json asks for {list(spec.shape)}"
            remedy = "use the config.json that came with the weights"
            raise CheckpointError(problem, file=file, tensor=spec.name, remedy=remedy)
        if view.dtype not in DTYPES[spec.kind]:
            problem = f"dtype {view.dtype}, {DTYPES[spec.kind][0]} is needed"
            raise CheckpointError(problem, file=file, tensor=spec.name, remedy=_dtype_remedy(view.dtype))
    unknown = sorted(views.keys() - wanted)
    if unknown and not drop_unknown:
        problem = f"is no tensor of this model ({len(unknown)} unknown in all)"
        remedy = "correct config.json, or leave such tensors out with --drop-unknown"
        raise CheckpointError(problem, file=folder, tensor=unknown[0], remedy=remedy)
    return {spec.name: views[spec.name] for spec in specs}


def _dtype_remedy(dtype: str) -> str:
    if dtype in ("F16", "F32", "F64"):
        return "save the model in bfloat16 first (model.to(torch.bfloat16).save_pretrained)"
    return "download the checkpoint again; only 128x128-block FP8 and BF16 checkpoints are converted"
