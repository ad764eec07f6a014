"""A model's weights written as the official files, one tensor after another: `save_pretrained`, with or without FP8.

Special about it: shapes are known before the first weight is touched, so each tensor goes straight to its place in
its file and is dropped. Beside the model there is one matrix in memory, not a second model; transformers copies stacks
of experts to take them apart, and keeps what was one stack in one file. With `quantize="fp8"` codes that are there
already (kept FP8, or the file that a model was fine-tuned from, where a weight still is what that file dequantises to)
are written back bit for bit; other matrices are quantised once, and what the rounding did to the change is measured.
All files get their names together at the end, so a folder may be saved over even while its files are read.

Letters: E routed experts, F expert width.
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, hub, logging

from ..configuration.layout import official_tensors, scale_shape
from ..conversion.errors import CheckpointError
from ..conversion.header import ITEM_BYTES, build_header
from ..conversion.reader import open_weights
from ..conversion.steps import Entry, Item, pack, shard_file
from ..conversion.writer import atomic_file, write_all, write_json
from ..kernels import dequantize_weight, quantize_weight
from .config import FP8Config
from .merging import RoundingReport
from .stored import DTYPE_NAMES, FP8, FP8_NAME, SCALE_SUFFIX, CheckpointTensors, read_scale

logger = logging.get_logger(__name__)

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5,6})?\.safetensors")


def are_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether every scale can be written in ue8m0 without rounding."""
    return bool((torch.frexp(scale.float())[0] == 0.5).all())


class Weights(NamedTuple):
    """A model's weights, for writing.

    Attributes:
        state_dict: the model's own names, experts fused; offloaded tensors on the meta device.
        fetch: gives an offloaded tensor by name.
        copies: further official names -> the name in `state_dict` whose tensor they hold, too.
        tied: names that another name stores.
    """

    state_dict: Mapping[str, torch.Tensor]
    fetch: Callable[[str], torch.Tensor]
    copies: Mapping[str, str]
    tied: Iterable[str]

    def names(self) -> Iterator[tuple[str, str]]:
        """(name to write, name in `state_dict`), of every tensor."""
        yield from ((name, name) for name in self.state_dict if name not in self.tied)
        yield from self.copies.items()

    def read(self, name: str) -> torch.Tensor:
        tensor = self.state_dict[name].detach()
        return self.fetch(name).detach() if tensor.is_meta else tensor


def streams(model: Any, weights: Weights, options: Iterable[str]) -> bool:
    """Whether `save_official` can write a model as it is; transformers writes what is packed or spread over processes,
    and does what else can be asked of it."""
    if getattr(model.config, "distributed_config", None) is not None:
        return False
    plain = all(not isinstance(t, DTensor) and t.dtype in DTYPE_NAMES for t in weights.state_dict.values())
    return plain and set(options) <= {"is_main_process", "max_shard_size"}


def save_official(
    model: Any,
    save_directory: Any,
    weights: Weights,
    *,
    quantize: str | None = None,
    scale_fmt: str | None = None,
    original: Any = None,
    is_main_process: bool = True,
    max_shard_size: int | str = "5GB",
    push_to_hub: bool = False,
    token: Any = None,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of every class of this package, which documents the arguments.

    Leaves the model's `rounding_report` behind: a `RoundingReport` with `original`, else None.
    """
    if (quantize, scale_fmt, original) != (None, None, None):
        _check(model, weights, quantize, scale_fmt, () if push_to_hub else kwargs)
    if not model.should_save_on_this_rank(is_main_process):
        return
    folder = Path(save_directory)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    send = _upload(model, folder, token, **kwargs) if push_to_hub else None
    try:
        model.rounding_report = write_official(
            weights,
            model.config,
            folder,
            quantize=quantize is not None,
            scale_fmt=scale_fmt,
            original=None if original is None else os.fspath(original),
            shard_bytes=hub.convert_file_size_to_int(max_shard_size),
        )
    except BaseException:
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    if quantize is not None:
        config.quantization_config, config.dtype = FP8Config(scale_fmt=scale_fmt), "bfloat16"
    # FSDP2 puts a class of its own over the model's.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if model.rounding_report:
        logger.warning(model.rounding_report.text())
        if warning := model.rounding_report.warning():
            logger.warning(warning)
    if send:
        send()


def _check(model: Any, weights: Weights, quantize: str | None, scale_fmt: str | None, unknown: Iterable[str]) -> None:
    if quantize != "fp8":
        raise ValueError(f"quantize={quantize!r}: only 'fp8' can be written; scale_fmt and original go with it")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt={scale_fmt!r}: choose None (float32 scales) or 'ue8m0' (powers of two)")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("quantize='fp8' writes whole models; merge the adapters first")
    if unknown:
        names = ", ".join(unknown)
        raise ValueError(f"quantize='fp8' goes without {names}: leave it out, or convert a saved folder to FP8 after")
    for name, tensor in weights.state_dict.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is spread over processes, and quantize='fp8' writes from one: give it a gathered "
                "state_dict=accelerator.get_state_dict(model), or save in BF16 and convert"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which the FP8 layout does not hold; call model.dequantize()")


def _upload(
    model: Any,
    folder: Path,
    token: Any,
    *,
    repo_id: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> Callable[[], None]:
    """Make the repository now, as transformers does, and give back what sends the files that will be new by then."""
    repo_id = hub.hf_api().create_repo(repo_id or folder.name, exist_ok=True, token=token, **kwargs).repo_id
    before = model._get_files_timestamps(folder)

    def send() -> None:
        hub.create_and_tag_model_card(repo_id, model.model_tags, token=token).save(folder / "README.md")
        model._upload_modified_files(
            folder, repo_id, before, commit_message=commit_message, token=token, create_pr=create_pr
        )

    return send


def write_official(
    weights: Weights,
    config: Any,
    folder: Path,
    *,
    quantize: bool,
    scale_fmt: str | None = None,
    original: str | None = None,
    shard_bytes: int,
) -> RoundingReport | None:
    """Write the safetensors files, and their index where there are several, of the official layout.

    Args:
        weights: what to write.
        config: the model's, which says what the official files hold.
        folder: where; what lies there stays whole until the last file is written, then older shards go.
        quantize: write E4M3 codes, float32 scales, router biases float32, the rest BF16; else everything as it is.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.
        original: a folder with the checkpoint that the model was fine-tuned from, FP8 or not, or None.
        shard_bytes: largest file in bytes.

    Returns:
        what rounding did to the changes, with `original`; else None.

    Raises:
        ValueError: weights that are not finite; kept codes whose scales `scale_fmt` cannot hold.
        OSError: the disk is full, or fails. In both cases nothing was written.
    """
    specs = official_tensors(config, quantized=True) if quantize else ()
    kinds: dict[str, str] = {spec.name: spec.kind for spec in specs}
    matrices = (name for name, kind in kinds.items() if kind == "fp8")
    untouched = _Original(original, scale_fmt, matrices) if original is not None else None
    groups = pack(_items(weights, kinds), shard_bytes)
    names = [shard_file(i, len(groups)) for i in range(1, len(groups) + 1)] if len(groups) > 1 else [SAFE_WEIGHTS_NAME]
    place: dict[str, tuple[int, int]] = {}
    with ExitStack() as files:
        if untouched:
            files.callback(untouched.tensors.close)
        for name, group in zip(names, groups, strict=True):
            fd = files.enter_context(atomic_file(folder / name))
            header, offsets, _ = build_header(_entries(group))
            write_all(fd, header, 0)
            place |= {tensor: (fd, offset) for tensor, offset in offsets.items()}
        for name, tensor in _official(weights, kinds, scale_fmt, untouched):
            write_all(place[name][0], tensor.contiguous().view(torch.uint8).numpy(), place[name][1])
    if len(groups) > 1:
        weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in _entries(group)}
        total = sum(item.nbytes for group in groups for item in group)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    else:
        (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _SHARD.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return untouched.report if untouched else None


def _entries(group: list[Item]) -> list[Entry]:
    """A file's tensors, wide element types first, so that each is aligned."""
    entries = [entry for item in group for entry in item.entries]
    return sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])


def _kind(kinds: dict[str, str], name: str, part: torch.Tensor) -> tuple[str, str]:
    """The name that the official list has for `name`, and "kept", "fp8" or a dtype of the part."""
    # A base model's names lack the prefix.
    known = name if name in kinds else f"model.{name}"
    kind = kinds.get(known, "")
    if part.dtype == FP8 or kind == "scale":
        return known, "kept"
    return known, {"fp8": "fp8", "bf16": "BF16", "f32": "F32"}.get(kind) or DTYPE_NAMES[part.dtype]


def _items(weights: Weights, kinds: dict[str, str]) -> Iterator[Item]:
    for name, source in weights.names():
        for official, part in _split(name, weights.state_dict[source].detach()):
            kind, shape = _kind(kinds, official, part)[1], tuple(part.shape)
            if kind == "fp8":
                scale = Entry(official + SCALE_SUFFIX, "F32", scale_shape(*shape))
                yield Item((Entry(official, FP8_NAME, shape), scale), ())
            else:
                yield Item((Entry(official, DTYPE_NAMES[part.dtype] if kind == "kept" else kind, shape),), ())


def _official(
    weights: Weights, kinds: dict[str, str], scale_fmt: str | None, untouched: "_Original | None"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors on the CPU, each made when it is asked for."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for name, source in weights.names():
        for official, part in _split(name, weights.read(source)):
            known, kind = _kind(kinds, official, part)
            if kind == "kept":
                yield official, _kept(official, part, scale_fmt)
            elif kind == "fp8":
                pair = untouched.codes(known, part) if untouched else _quantize(official, part, scale_fmt)
                yield from zip((official, official + SCALE_SUFFIX), pair, strict=True)
            else:
                yield official, part.to("cpu", dtypes[kind])


def _split(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The official tensors that a parameter holds."""
    match = _FUSED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    prefix, which, suffix = match[1], match[2], match[3] or ""
    for expert, matrix in enumerate(tensor):
        names = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
            yield f"{prefix}.{expert}.{part}.weight{suffix}", rows


def _kept(name: str, tensor: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    if scale_fmt is not None and tensor.dtype != FP8 and not are_powers_of_two(tensor):
        raise ValueError(
            f"{name}: the codes kept in memory have scales that are no powers of two, and {scale_fmt} would round "
            "them. Save with scale_fmt=None, or load with FP8Config(keep=False) to quantise anew"
        )
    return tensor.cpu().contiguous()


def _quantize(name: str, tensor: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_weight(tensor, scale_fmt=scale_fmt)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity; nothing was written. Train again from an earlier checkpoint")
    return codes.cpu(), scale.cpu()


class _Original:
    """The checkpoint that a model came from, FP8 or not, to tell which weights training left alone."""

    def __init__(self, folder: str, scale_fmt: str | None, names: Iterable[str]) -> None:
        found = open_weights(Path(folder))
        if found is None:
            remedy = "give the checkpoint that the model was fine-tuned from as `original`"
            raise CheckpointError("holds no safetensors", file=folder, remedy=remedy)
        self.tensors = CheckpointTensors([os.path.join(folder, name) for name in found.files])
        self.names = self.tensors.fp8_weights()
        if not any(name in self.tensors for name in names):
            self.tensors.close()
            raise ValueError(
                f"original={folder} holds none of this model's weights; give the checkpoint that it was fine-tuned "
                "from, under the official names, or leave it out"
            )
        self.scale_fmt = scale_fmt
        self.report = RoundingReport()

    def codes(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.cpu()
        if name not in self.tensors:
            return _quantize(name, weight, self.scale_fmt)
        if self.tensors.shape(name) != tuple(weight.shape):
            raise ValueError(
                f"{name} is {list(weight.shape)} here and {list(self.tensors.shape(name))} in `original`; give the "
                "checkpoint that this model was fine-tuned from"
            )
        return self._kept_codes(name, weight) if name in self.names else self._from_plain(name, weight)

    def _kept_codes(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = self.tensors.read(name), read_scale(self.tensors, name + SCALE_SUFFIX)
        before = dequantize_weight(codes, scale, dtype=weight.dtype)
        fits = self.scale_fmt is None or are_powers_of_two(scale)
        if torch.equal(before, weight) and fits:
            self.report.untouched += 1
            return codes, scale
        pair = _quantize(name, weight, self.scale_fmt)
        self.report.add(name, before, weight, dequantize_weight(*pair, dtype=torch.float32))
        return pair

    def _from_plain(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.tensors.read(name).to(weight.dtype)
        pair = _quantize(name, weight, self.scale_fmt)
        if torch.equal(before, weight):
            self.report.untouched += 1
            return pair
        # FP8 rounds the original as well: what came of the change is the difference of the two.
        wide = [
            dequantize_weight(*each, dtype=torch.float32) for each in (_quantize(name, before, self.scale_fmt), pair)
        ]
        self.report.add(name, before, weight, wide[1], rounded=wide[0])
        return pair
