"""From an open checkpoint and the wish for another layout to a list of output files, before a byte is written.

Everything that can be wrong with names, shapes, dtypes, scales and options is found here, so that a conversion that
starts is one that can finish.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from deepseek_v3.configuration.layout import FP8_BLOCK, TensorSpec, official_tensors, scale_shape

from .config_json import block_quantization, converted_config
from .errors import CheckpointError
from .inference_names import Placement, expert_range, placement
from .layouts import SCALE_SUFFIX, check_views, config_view, is_mtp, is_quantized, official_views
from .reader import CONFIG_NAME, Checkpoint, rank_file
from .steps import Entry, Item, Job, Step, lay_out, pack, shard_file
from .views import Source, View, window

Target = Literal["fp8", "bf16", "fused", "inference"]
DEFAULT_SHARD_BYTES = 5_000_000_000
_SAFETENSORS = {"fp8": "F8_E4M3", "scale": "F32", "bf16": "BF16", "f32": "F32"}


@dataclass(frozen=True)
class Options:
    """What is wanted. `convert` documents each field."""

    to: Target
    scale_fmt: str | None = None
    model_parallel: int = 1
    keep_mtp: bool = False
    shard_bytes: int | None = None
    drop_unknown: bool = False
    remote_code: bool = False


@dataclass
class Plan:
    """The files to write, their index (None for the inference layout), the new config.json, remarks for the user."""

    jobs: list[Job]
    index: dict[str, Any] | None
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the safetensors files to write."""
        return sum(job.nbytes for job in self.jobs)


@dataclass
class Official:
    """A checkpoint seen through the official layout: views by name, in order, and what the config says."""

    views: dict[str, View]
    specs: list[TensorSpec]
    config: SimpleNamespace
    quantized: bool
    notes: list[str]


def official_form(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None, *, drop_unknown: bool = False
) -> Official:
    """See any checkpoint as the official layout and check it against its configuration.

    Args:
        checkpoint: an open checkpoint.
        config: used where the folder has no config.json of its own.
        drop_unknown: leave tensors out that the model does not have, instead of refusing them.

    Raises:
        CheckpointError: no configuration, or one that contradicts the tensors.
    """
    raw, file = checkpoint.config or config, checkpoint.folder / CONFIG_NAME
    if not raw:
        raise CheckpointError("is missing", file=file, remedy="put the model's config.json there or give --config")
    view = config_view(raw, file)
    quantized, notes = is_quantized(checkpoint), []
    block_quantization(raw, quantized, file)
    views = official_views(checkpoint, view)
    if "num_nextn_predict_layers" not in raw:
        while f"model.layers.{view.num_hidden_layers + view.num_nextn_predict_layers}.enorm.weight" in views:
            view.num_nextn_predict_layers += 1
    elif view.num_nextn_predict_layers and not any(is_mtp(name, view) for name in views):
        view.num_nextn_predict_layers = 0
        notes.append("the MTP layers that config.json announces are not in the files; the result has none")
    specs = list(official_tensors(view, quantized=quantized))
    views = check_views(views, specs, checkpoint.folder, drop_unknown=drop_unknown)
    return Official(views, specs, view, quantized, notes)


def check_scales(official: Official, folder: Path, *, powers_of_two: bool = False) -> None:
    """Read every scale: each must be finite and positive, and a power of two if that is asked for.

    Raises:
        CheckpointError: names the first one that is not.
    """
    with Source() as source:
        for spec in official.specs:
            if spec.kind != "scale":
                continue
            view = official.views[spec.name]
            file = view.tiles[0].file if view.tiles else folder
            raw = source.array(view)
            # E8M0 is an exponent: every value is positive, 255 is NaN.
            values = np.where(raw == 255, np.nan, 1.0) if view.dtype == "F8_E8M0" else raw.view(np.float32)
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                row, column = np.argwhere(bad)[0]
                problem = f"scale [{row}, {column}] is {values[row, column]}, every scale must be finite and positive"
                raise CheckpointError(problem, file=file, tensor=spec.name, remedy="download the file again")
            if powers_of_two and view.dtype == "F32" and (raw & 0x7FFFFF).any():
                problem = "has scales that are not powers of two, and rounding them would change the weights"
                remedy = "leave --scale-fmt out, or convert to bf16 first and from there to ue8m0"
                raise CheckpointError(problem, file=file, tensor=spec.name, remedy=remedy)


def make_plan(
    checkpoint: Checkpoint, options: Options, config: dict[str, Any] | None = None, like: Checkpoint | None = None
) -> Plan:
    """Plan a conversion.

    Args:
        checkpoint: the source.
        options: what is wanted.
        config: used where the source has no config.json.
        like: an FP8 checkpoint whose codes and scales are kept wherever the source holds exactly their values.

    Raises:
        CheckpointError: the source is not sound, or the options do not fit it.
    """
    official = official_form(checkpoint, config, drop_unknown=options.drop_unknown)
    check_scales(
        official, checkpoint.folder, powers_of_two=options.to in ("fp8", "inference") and options.scale_fmt is not None
    )
    raw = checkpoint.config or config or {}
    if options.to == "inference":
        jobs = _plan_ranks(official, options, checkpoint.folder)
        final = converted_config(raw, official.config, "fp8" if official.quantized else "bf16", None)
        if not options.keep_mtp:
            final["num_nextn_predict_layers"] = 0
        return Plan(jobs, None, final, official.notes)
    reference = _reference(like, options, official) if like is not None else {}
    if options.to == "fp8":
        items = _fp8_items(official, options.scale_fmt, reference)
    else:
        items = _bf16_items(official, fused=options.to == "fused")
    groups = _groups(items, checkpoint, options)
    jobs = [lay_out(shard_file(i, len(groups)), group) for i, group in enumerate(groups, 1)]
    weight_map = {name: job.file for job in jobs for name in sorted(job.tensors)}
    total = sum(item.nbytes for item in items)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    final = converted_config(raw, official.config, options.to, options.scale_fmt)
    return Plan(jobs, index, final, official.notes)


def _reference(like: Checkpoint, options: Options, official: Official) -> dict[str, View]:
    if options.to != "fp8" or official.quantized:
        raise CheckpointError("--like is for BF16 to FP8 alone", remedy="leave it out")
    known = official_form(like)
    if not known.quantized:
        raise CheckpointError("holds no FP8 weights to take codes from", file=like.folder, remedy="leave --like out")
    check_scales(known, like.folder, powers_of_two=options.scale_fmt is not None)
    return known.views


def _entry(spec: TensorSpec) -> Entry:
    return Entry(spec.name, _SAFETENSORS[spec.kind], tuple(spec.shape))


def _plain_step(name: str, view: View, dtype: str, offset: int = 0) -> Step:
    return Step("copy" if view.dtype == dtype else "widen", name, view, offset=offset)


def _fp8_items(official: Official, scale_fmt: str | None, reference: dict[str, View]) -> list[Item]:
    items = []
    for spec in official_tensors(official.config, quantized=True):
        if official.quantized or spec.kind in ("bf16", "f32"):
            entry = _entry(spec)
            items.append(Item((entry,), (_plain_step(spec.name, official.views[spec.name], entry.dtype),)))
        elif spec.kind == "fp8":
            scale_name = spec.name + SCALE_SUFFIX
            scale = Entry(scale_name, "F32", scale_shape(*spec.shape))
            view, pair = official.views[spec.name], (reference.get(spec.name), reference.get(scale_name))
            like = (pair[0], pair[1]) if pair[0] and pair[1] and pair[0].shape == view.shape else None
            step = Step("quantise", spec.name, view, scale_fmt=scale_fmt, like=like)
            items.append(Item((_entry(spec), scale), (step,)))
    return items


def _bf16_step(official: Official, spec: TensorSpec, offset: int = 0) -> Step:
    view = official.views[spec.name]
    if view.dtype == "F8_E4M3":
        return Step("dequantise", spec.name, view, scale=official.views[spec.name + SCALE_SUFFIX], offset=offset)
    return _plain_step(spec.name, view, _SAFETENSORS[spec.kind], offset)


def _bf16_items(official: Official, *, fused: bool) -> list[Item]:
    """Items of the official BF16 layout, or of the fused one with each layer's experts as two stacked tensors."""
    config, items = official.config, []
    stacks: dict[str, list[Step]] = {}
    for spec in official_tensors(config, quantized=False):
        prefix, _, rest = spec.name.partition(".mlp.experts.")
        if not fused or not rest:
            items.append(Item((_entry(spec),), (_bf16_step(official, spec),)))
            continue
        # gate e, up e, gate e+1, ... and down e, down e+1, ... follow each other in the stacked tensors.
        kind = "down_proj" if rest.endswith("down_proj.weight") else "gate_up_proj"
        steps = stacks.setdefault(f"{prefix}.mlp.experts.{kind}", [])
        height, width = spec.shape
        steps.append(_bf16_step(official, spec, len(steps) * height * width * 2))
        if len(steps) == config.n_routed_experts * (1 if kind == "down_proj" else 2):
            shape = (config.n_routed_experts, height if kind == "down_proj" else 2 * height, width)
            name = f"{prefix}.mlp.experts.{kind}"
            items.append(Item((Entry(name, "BF16", shape),), tuple(stacks.pop(name))))
    return items


def _groups(items: list[Item], checkpoint: Checkpoint, options: Options) -> list[list[Item]]:
    """Items by output file: as the source's files where names correspond one to one, else by size."""
    if options.shard_bytes is not None or checkpoint.layout != "official" or options.to == "fused":
        return pack(items, options.shard_bytes or DEFAULT_SHARD_BYTES)
    by_file: dict[str, list[Item]] = {str(checkpoint.folder / name): [] for name in checkpoint.files}
    for item in items:
        by_file[checkpoint[item.entries[0].name].file].append(item)
    return [group for group in by_file.values() if group]


def _plan_ranks(official: Official, options: Options, folder: Path) -> list[Job]:
    ranks, config = options.model_parallel, official.config
    if config.n_routed_experts % ranks:
        problem = f"{config.n_routed_experts} experts cannot be shared by {ranks} ranks"
        raise CheckpointError(problem, file=folder, remedy="choose a --model-parallel that divides them")
    specs = [spec for spec in official.specs if options.keep_mtp or not is_mtp(spec.name, config)]
    placed = [(spec, placement(spec.name)) for spec in specs]
    for spec, where in placed:
        if where.axis is not None:
            _check_cut(spec, where.axis, ranks, folder, config)
    jobs = []
    for rank in range(ranks):
        mine = expert_range(config, rank, ranks)
        items = [
            _rank_item(spec, where, official.views[spec.name], rank, ranks)
            for spec, where in placed
            if where.expert is None or where.expert in mine
        ]
        jobs.append(lay_out(rank_file(rank, ranks), items))
    return jobs


def _check_cut(spec: TensorSpec, axis: int, ranks: int, folder: Path, config: Any) -> None:
    """A cut must fall between elements, and for FP8 between blocks, or ranks would need each other's scales."""
    extent = spec.shape[axis]
    unit = FP8_BLOCK if spec.kind == "fp8" else 1
    if ranks > 1 and extent % (unit * ranks):
        blocks = f" of whole FP8 blocks ({unit})" if unit > 1 else ""
        problem = f"dimension {axis} ({extent}) cannot be cut for {ranks} ranks into equal parts{blocks}"
        remedy = "choose a smaller --model-parallel, or convert to bf16 first"
        raise CheckpointError(problem, file=folder, tensor=spec.name, remedy=remedy)


def _rank_item(spec: TensorSpec, where: Placement, view: View, rank: int, ranks: int) -> Item:
    if where.axis is not None and ranks > 1:
        share = spec.shape[where.axis] // ranks
        view = window(view, where.axis, rank * share, (rank + 1) * share)
    dtype = _SAFETENSORS[spec.kind]
    return Item((Entry(where.name, dtype, tuple(view.shape)),), (_plain_step(spec.name, view, dtype),))
