"""What a checkpoint folder holds, from headers alone: layout, model, parameters, bytes, gaps, and what it needs.

Nothing here loads torch or reads a tensor, so the official 163 files take a fraction of a second.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, prod
from pathlib import Path
from typing import Any

from deepseek_v3.configuration.accounting import BYTES, NF4_BYTES, Account, account
from deepseek_v3.configuration.layout import official_tensors
from deepseek_v3.configuration.presets import recognise

from .config_json import block_quantization
from .errors import CheckpointError
from .header import ITEM_BYTES, TensorInfo
from .layouts import DTYPES, SCALE_SUFFIX, config_view, mtp_layers, official_views, part_of
from .reader import CONFIG_NAME, Checkpoint, open_checkpoint
from .report import aligned, readable
from .views import View

Stored = Mapping[str, TensorInfo] | Mapping[str, View]

_CONTEXT = 4096
_SHOWN = 20


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        folder, layout: where it lies and how it is arranged ("official", "fused", "inference").
        precision: "fp8" (some weights are), "bf16" (no FP8 weight).
        scale_fmt: of an FP8 checkpoint's config.json: None (float32 scales) or "ue8m0".
        preset: name of the published model with these sizes, None if there is none or no config.json.
        files, tensors, file_bytes: how many, and their sizes in bytes.
        dtypes: dtype -> {"tensors", "bytes"}.
        parameters: part -> {"found", "expected"}: numbers stored, without scales; expected by the accounting.
        mtp_announced, mtp_found: MTP modules that config.json announces (None without one) and that are in the files.
        missing, unexpected, misshapen: official names; misshapen ones (or of a wrong dtype) with what is wrong.
        contradiction: what config.json says that the tensors do not, if anything.
        needs: precision in memory ("fp8" where it is stored, "bf16", "float32", "nf4") -> bytes: "weights",
            "host_to_load" (RAM to load into RAM: weights and two shards), "host_for_gpu" (RAM to load into VRAM:
            two shards), "cache" (latent cache of 4,096 tokens). Empty without a config.json.
    """

    folder: str
    layout: str
    precision: str
    scale_fmt: str | None
    preset: str | None
    files: int
    tensors: int
    file_bytes: int
    dtypes: dict[str, dict[str, int]]
    parameters: dict[str, dict[str, int | None]]
    mtp_announced: int | None
    mtp_found: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    contradiction: str | None = None
    needs: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether the files hold exactly what the configuration asks for."""
        return not (self.missing or self.unexpected or self.misshapen or self.contradiction)

    def as_dict(self) -> dict[str, Any]:
        """The findings for JSON."""
        return {"sound": self.sound, **asdict(self)}

    def text(self) -> str:
        """The findings for people."""
        scales = f", scales {self.scale_fmt or 'float32'}" if self.precision == "fp8" else ""
        announced = "" if self.mtp_announced is None else f" of {self.mtp_announced} announced"
        lines = [
            f"{self.folder}",
            f"model        {self.preset or 'of no published size'}",
            f"layout       {self.layout}, {self.precision}{scales}",
            f"files        {self.files} with {self.tensors} tensors, {readable(self.file_bytes)}",
            f"MTP          {self.mtp_found} modules{announced}",
            "",
        ]
        lines += aligned(
            [("dtype", "tensors", "bytes")] + [(k, v["tensors"], v["bytes"]) for k, v in self.dtypes.items()]
        )
        parameters = [
            (part, v["found"], "?" if v["expected"] is None else v["expected"]) for part, v in self.parameters.items()
        ]
        lines += ["", *aligned([("parameters", "found", "expected"), *parameters])]
        if self.needs:
            wanted = ("weights", "host_to_load", "host_for_gpu", "cache")
            rows = [(label, *(readable(need[key]) for key in wanted)) for label, need in self.needs.items()]
            title = ("to load as", "RAM or VRAM", "peak RAM on CPU", "peak RAM for GPU", f"{_CONTEXT} tokens' cache")
            lines += ["", *aligned([title, *rows])]
        lines += ["", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> list[str]:
        if self.sound:
            return ["sound: every tensor that the configuration asks for is there, and no other"]
        lines = [f"contradiction: config.json {self.contradiction}"] if self.contradiction else []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"{what}: {name}" for name in names[:_SHOWN]]
            lines += [f"... {len(names) - _SHOWN} more {what}"] if len(names) > _SHOWN else []
        lines += [f"wrong: {name}: {why}" for name, why in list(self.misshapen.items())[:_SHOWN]]
        return lines + ([f"... {len(self.misshapen) - _SHOWN} more wrong"] if len(self.misshapen) > _SHOWN else [])


def inspect(folder: str | Path) -> Inspection:
    """Look at a checkpoint of any layout that `open_checkpoint` reads.

    Raises:
        CheckpointError: the folder is no sound set of safetensors, or its config.json has no usable sizes.
    """
    checkpoint = open_checkpoint(folder)
    dtypes = _by_dtype(checkpoint)
    result = Inspection(
        folder=str(folder),
        layout=checkpoint.layout,
        precision="fp8" if "F8_E4M3" in dtypes else "bf16",
        scale_fmt=None,
        preset=None,
        files=len(checkpoint.files),
        tensors=sum(entry["tensors"] for entry in dtypes.values()),
        file_bytes=checkpoint.nbytes,
        dtypes=dtypes,
        parameters={},
        mtp_announced=None,
        mtp_found=0,
    )
    if checkpoint.config:
        _against_config(result, checkpoint)
    elif checkpoint.layout == "inference":
        file = checkpoint.folder / CONFIG_NAME
        raise CheckpointError("is missing", file=file, remedy="put the model's config.json there")
    else:
        _count(result, official_views(checkpoint, None), None, None)
    return result


def _by_dtype(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    infos = [info for header in checkpoint.files.values() for info in header.tensors.values()]
    counts = Counter(info.dtype for info in infos)
    # A handful of shapes make up ninety thousand tensors.
    shapes = Counter((info.dtype, info.shape) for info in infos)
    sizes: Counter[str] = Counter()
    for (dtype, shape), number in shapes.items():
        sizes[dtype] += number * prod(shape) * ITEM_BYTES[dtype]
    return {dtype: {"tensors": counts[dtype], "bytes": sizes[dtype]} for dtype in sorted(counts)}


def _against_config(result: Inspection, checkpoint: Checkpoint) -> None:
    file = checkpoint.folder / CONFIG_NAME
    view = config_view(checkpoint.config, file)
    result.preset = recognise(view)
    result.mtp_announced = view.num_nextn_predict_layers
    quantized = result.precision == "fp8"
    try:
        result.scale_fmt = (block_quantization(checkpoint.config, quantized, file) or {}).get("scale_fmt")
    except CheckpointError as error:
        result.contradiction = error.problem
    # No views of official files: building 92,000 of them would take longer than reading the headers.
    official = checkpoint.layout == "official"
    stored: Stored = checkpoint.tensors if official else official_views(checkpoint, view)
    wanted, shapes = set(), Counter[tuple[str, tuple[int, ...]]]()
    for name, shape, kind in official_tensors(view, quantized=quantized):
        wanted.add(name)
        shapes[kind, shape] += 1
        found = stored.get(name)
        if found is None:
            result.missing.append(name)
        elif found.shape != shape:
            result.misshapen[name] = f"shape {list(found.shape)}, expected {list(shape)}"
        elif found.dtype not in DTYPES[kind]:
            result.misshapen[name] = f"dtype {found.dtype}, expected {DTYPES[kind][0]}"
    numbers = Counter[str]()
    for (stored_as, shape), count in shapes.items():
        numbers[stored_as] += count * prod(shape)
    result.unexpected = sorted(stored.keys() - wanted)
    bill = account(view)
    _count(result, stored, view, bill)
    _estimate(result, checkpoint, view, bill, numbers)


def _count(result: Inspection, stored: Stored, view: Any, bill: Account | None) -> None:
    layers = mtp_layers(stored)
    result.mtp_found = len(layers)
    first = view.num_hidden_layers if view is not None else min(layers, default=inf)
    found: dict[str, int] = {}
    parts: dict[str, str] = {}
    for name, info in stored.items():
        if not name.endswith(SCALE_SUFFIX):
            # All experts of a layer are the same part.
            group = "".join(name.partition(".experts.")[:2])
            part = parts.get(group) or parts.setdefault(group, part_of(group, first))
            found[part] = found.get(part, 0) + prod(info.shape)
    expected: dict[str, int] = {}
    if bill is not None:
        expected = dict(bill.parts)
        if view.num_nextn_predict_layers:
            expected["mtp"] = bill.checkpoint_parameters - bill.main_parameters
    for part in [*expected, *(part for part in found if part not in expected)]:
        result.parameters[part] = {"found": found.get(part, 0), "expected": expected.get(part) if expected else None}
    totals = (sum(found.values()), sum(expected.values()) if expected else None)
    result.parameters["total"] = {"found": totals[0], "expected": totals[1]}


def _estimate(
    result: Inspection, checkpoint: Checkpoint, view: Any, bill: Account, numbers: Mapping[str, int]
) -> None:
    """Memory for the model itself; MTP's second copies of embedding and head are shared once loaded."""
    shard = max(header.file_bytes for header in checkpoint.files.values())
    copies = 2 * view.num_nextn_predict_layers * view.vocab_size * view.hidden_size
    parameters = bill.checkpoint_parameters - copies
    if result.precision != "fp8":
        specs = official_tensors(view, quantized=True)
        matrices = sum(prod(shape) for _, shape, kind in specs if kind == "fp8")
    else:
        matrices = numbers["fp8"]
    # The router's bias stays float32 whatever the rest is loaded as.
    bf16 = 2 * parameters + 2 * numbers["f32"]
    weights = {"bf16": bf16, "float32": 4 * parameters, "nf4": bf16 - 2 * matrices + round(NF4_BYTES * matrices)}
    if result.precision == "fp8":
        stored = sum(BYTES[kind] * count for kind, count in numbers.items())
        weights = {"fp8": stored - 2 * copies, **weights}
    for label, nbytes in weights.items():
        cache = _CONTEXT * bill.cache_bytes_per_token("float32" if label == "float32" else "bfloat16")
        loading = {"host_to_load": nbytes + 2 * shard, "host_for_gpu": 2 * shard}
        result.needs[label] = {"weights": nbytes, **loading, "cache": cache}
