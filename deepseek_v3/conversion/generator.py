"""Writes checkpoints in the exact official layout at any size, for tests and benchmarks, filled with random numbers.

Special about it: the places where readers stumble are there on purpose. Files are cut between a weight and its scale
wherever they can be, an MTP layer's extras lie in the last file, 576-row matrices have a ragged last block, and
float32 scales are no powers of two. Numbers come from the seed and the tensor's name, so every file is reproducible,
and a tensor is made band by band, so a layer at true dimensions needs little memory.
"""

import hashlib
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from deepseek_v3.configuration.layout import FP8_BLOCK, TensorSpec, is_moe_layer, official_tensors

from .config_json import converted_config
from .errors import CheckpointError
from .header import ITEM_BYTES, build_header
from .layouts import SCALE_SUFFIX, config_view
from .reader import CONFIG_NAME, INDEX_NAME
from .steps import Entry, shard_file
from .writer import atomic_file, write_all, write_json

_DTYPES = {"fp8": "F8_E4M3", "scale": "F32", "bf16": "BF16", "f32": "F32"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MTP_COPY = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
_EXTRAS = re.compile(r"model\.layers\.\d+\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)\.")
_BAND_ELEMENTS = 1 << 20
_SCALE_SEARCH = 8
_WEIGHT_STD, _ROW_SPREAD = 0.02, 0.3


def write_checkpoint(
    config: Any,
    folder: str | Path,
    *,
    quantized: bool = True,
    scale_fmt: str | None = None,
    shards: int | None = None,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    sparse: bool = False,
) -> Path:
    """Write a checkpoint of random weights in the official layout: shards, index, config.json.

    Args:
        config: a `DeepseekV3Config`, a dictionary of config.json's keys, or an object with its attributes.
        folder: where; must not exist or be empty.
        quantized: FP8 codes and scales for the matrices that the official files quantise, else BF16 throughout.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.
        shards: number of files, None for one for each 4.3 GB as the official ones have.
        seed: of the numbers.
        layers: indices of the decoder layers to write, renumbered from 0 with config.json to match: `(0, 3)` of
            "deepseek-v3" is a dense and an expert layer of true size. The MTP modules follow `num_hidden_layers` in
            the numbering. None writes all.
        sparse: leave the data as holes (zeros) that take no space: true sizes for whoever reads headers alone.

    Returns:
        the folder.

    Raises:
        CheckpointError: the folder is not empty, the configuration has no usable sizes, or a bad scale_fmt.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError("is not empty", file=folder, remedy="choose an empty folder")
    if scale_fmt not in (None, "ue8m0"):
        raise CheckpointError(f"there is no scale format {scale_fmt!r}", remedy="choose 'ue8m0' or none")
    raw = _select_layers(_as_dict(config), layers)
    view = config_view(raw, folder / CONFIG_NAME)
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    raw = converted_config(raw, view, "fp8" if quantized else "bf16", scale_fmt)
    specs = list(official_tensors(view, quantized=quantized))
    # A stable sort: everything else in order, then the MTP extras.
    specs.sort(key=lambda spec: _EXTRAS.match(spec.name) is not None)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _cut(specs, shards)
    weight_map: dict[str, str] = {}
    tied = not any(spec.name == _HEAD for spec in specs)
    numbers = _Numbers(seed, scale_fmt, head=_EMBEDDING if tied else _HEAD)
    for number, group in enumerate(groups, 1):
        name = shard_file(number, len(groups))
        _write_file(folder / name, group, numbers, sparse)
        weight_map.update({spec.name: name for spec in group})
    write_json(folder / CONFIG_NAME, raw)
    total = sum(_nbytes(spec) for spec in specs)
    write_json(
        folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    return folder


def _as_dict(config: Any) -> dict[str, Any]:
    """config.json's keys; what only a Python object can hold (dtypes) is spelt out by its own writer."""
    if isinstance(config, dict):
        return dict(config)
    if hasattr(config, "to_json_string"):
        return dict(json.loads(config.to_json_string(use_diff=False)))
    return dict(vars(config))


def _select_layers(raw: dict[str, Any], layers: Iterable[int] | None) -> dict[str, Any]:
    if layers is None:
        return raw
    view = config_view(raw, CONFIG_NAME)
    chosen = sorted(set(layers))
    known = range(view.num_hidden_layers + view.num_nextn_predict_layers)
    main = [index for index in chosen if index < view.num_hidden_layers]
    if not main or any(index not in known for index in chosen):
        problem = f"layers {chosen} are not a choice out of {len(known)} with a main layer among them"
        raise CheckpointError(problem, remedy="give indices of the configuration's layers")
    dense = [index for index in main if not is_moe_layer(view, index)]
    if dense != main[: len(dense)]:
        raise CheckpointError("dense layers must come before expert layers", remedy="give other layers")
    sizes = {"num_hidden_layers": len(main), "first_k_dense_replace": len(dense), "moe_layer_freq": 1}
    return {**raw, **sizes, "num_nextn_predict_layers": len(chosen) - len(main)}


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * ITEM_BYTES[_DTYPES[spec.kind]]


def _cut(specs: list[TensorSpec], shards: int | None) -> list[list[TensorSpec]]:
    """Cut the sequence into files of about equal bytes, between a weight and its scale where one is near."""
    ends = list(accumulate(_nbytes(spec) for spec in specs))
    shards = max(1, round(ends[-1] / 4.3e9)) if shards is None else shards
    # The last file begins with the MTP extras or before them.
    last = next((i for i, spec in enumerate(specs) if _EXTRAS.match(spec.name)), len(specs) - 1)
    if not 1 <= shards <= last + 1:
        problem = f"{shards} files cannot be made of {len(specs)} tensors"
        raise CheckpointError(problem, remedy=f"give 1 to {last + 1}")
    starts = [0]
    for number in range(1, shards):
        latest = last - (shards - 1 - number)
        due = bisect_left(ends, ends[-1] * number / shards) + 1
        start = min(max(due, starts[-1] + 1), latest)
        nearby = range(start, min(start + _SCALE_SEARCH, latest + 1))
        starts.append(next((i for i in nearby if specs[i].kind == "scale"), start))
    return [specs[begin:end] for begin, end in zip(starts, [*starts[1:], len(specs)], strict=True)]


class _Numbers:
    """The random contents of tensors; a matrix's scales are kept until their own turn comes."""

    def __init__(self, seed: int, scale_fmt: str | None, head: str) -> None:
        self.seed, self.scale_fmt = seed, scale_fmt
        self.copied = {"embed_tokens": _EMBEDDING, "shared_head.head": head}
        self._scales: dict[str, Any] = {}

    def bands(self, spec: TensorSpec) -> Iterator[Any]:
        """The tensor's bytes from first to last, in buffers of a few MiB."""
        import torch

        from deepseek_v3.kernels import quantize_weight

        if spec.kind == "scale":
            yield self._scales.pop(spec.name)
            return
        # An MTP module's embedding and head are the main model's, stored again.
        name = _MTP_COPY.sub(lambda match: self.copied[match[1]], spec.name)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if len(spec.shape) == 1:
            # Norm weights lie around one, the router's biases around zero.
            centre, spread = (0.0, 0.05) if spec.kind == "f32" else (1.0, 0.1)
            vector = torch.randn(spec.shape, generator=generator) * spread + centre
            yield _raw(vector if spec.kind == "f32" else vector.bfloat16())
            return
        scales = []
        for weights in _matrix_bands(spec.shape, generator):
            if spec.kind == "fp8":
                codes, scale = quantize_weight(weights, scale_fmt=self.scale_fmt)
                scales.append(scale)
                yield _raw(codes)
            else:
                yield _raw(weights.bfloat16())
        if scales:
            self._scales[spec.name + SCALE_SUFFIX] = _raw(torch.cat(scales))


def _matrix_bands(shape: tuple[int, ...], generator: Any) -> Iterator[Any]:
    """Float32 bands of whole 128-row blocks: normal numbers, each row with a spread of its own."""
    import torch

    rows, columns = shape
    step = max(1, _BAND_ELEMENTS // (columns * FP8_BLOCK)) * FP8_BLOCK
    for begin in range(0, rows, step):
        height = min(step, rows - begin)
        spread = torch.randn(height, 1, generator=generator).mul_(_ROW_SPREAD).exp_().mul_(_WEIGHT_STD)
        yield torch.randn(height, columns, generator=generator).mul_(spread)


def _raw(tensor: Any) -> Any:
    """A tensor's bytes, not copied."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def _write_file(path: Path, group: list[TensorSpec], numbers: "_Numbers", sparse: bool) -> None:
    entries = [Entry(spec.name, _DTYPES[spec.kind], tuple(spec.shape)) for spec in group]
    entries.sort(key=lambda entry: -ITEM_BYTES[entry.dtype])
    header, offsets, nbytes = build_header(entries)
    with atomic_file(path) as fd:
        os.ftruncate(fd, nbytes)
        write_all(fd, header, 0)
        for spec in group if not sparse else ():
            offset = offsets[spec.name]
            for data in numbers.bands(spec):
                write_all(fd, data, offset)
                offset += data.nbytes
