"""Opens a checkpoint folder: which files belong to it, and where each tensor lies. Headers only, no framework.

Special about it: an index is somebody else's list of paths. Every name in it must be a plain file name, and what
it names must lie in the folder, whatever links say; the one exception is the Hub cache, whose snapshots are links
into the `blobs` folder of the same repository.
"""

import re
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError
from .header import Header, TensorInfo, read_header, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
Layout = Literal["official", "fused", "inference"]
RANK_FILE = re.compile(r"model(\d{1,6})-mp(\d{1,6})\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_CONFIG_BYTES = 4 << 20
_NO_PICKLE = "save the model again as safetensors (save_pretrained does); pickles are never opened"
_FUSED_MARK = ".mlp.experts.gate_up_proj"


class Checkpoint:
    """A folder of safetensors whose headers have been read and held against each other.

    Attributes:
        folder: where it lies.
        layout: "official" (the published names), "fused" (transformers' stacked experts) or "inference"
            (DeepSeek's `model{i}-mp{N}.safetensors`).
        config: config.json as a dictionary, {} where there is none.
        files: file name -> header, in the order of the names.
        tensors: tensor name -> where it lies; empty for the inference layout.
        ranks: for the inference layout, the tensors of each rank.
    """

    def __init__(self, folder: Path, layout: Layout, config: dict[str, Any], files: dict[str, Header]) -> None:
        self.folder, self.layout, self.config, self.files = folder, layout, config, files
        self.tensors: dict[str, TensorInfo] = {}
        self.ranks: list[dict[str, TensorInfo]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all its safetensors files."""
        return sum(header.file_bytes for header in self.files.values())

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError("is not in this checkpoint", file=self.folder, tensor=name) from None


def safe_path(folder: Path, name: str, *, named_by: str = INDEX_NAME) -> Path:
    """The path of the file `name` of `folder`, once it is sure that it lies there.

    Raises:
        CheckpointError: `name` is a path instead of a file name, does not exist, or is a link out of the folder.
    """
    source = folder / named_by
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or not name.isprintable():
        problem = f"names {name[:100]!r}, which is not a plain file name in this folder"
        raise CheckpointError(problem, file=source, remedy="shards must lie beside their index: correct it")
    path = folder / name
    if not path.exists():
        state = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"{state} ({named_by} names it)", file=path, remedy="copy or download it again")
    real_folder, real = folder.resolve(), path.resolve()
    allowed = [real_folder]
    if real_folder.parent.name == "snapshots":
        allowed.append(real_folder.parent.parent / "blobs")
    if real.parent not in allowed:
        raise CheckpointError(f"is a link out of the folder, to {real}", file=path, remedy="put the file in its place")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, {} if it has none."""
    if not (folder / CONFIG_NAME).exists() and not (folder / CONFIG_NAME).is_symlink():
        return {}
    return read_json(safe_path(folder, CONFIG_NAME, named_by="the folder"), _MAX_CONFIG_BYTES)


def open_checkpoint(folder: str | Path, layout: Literal["auto", "inference"] = "auto") -> Checkpoint:
    """Open a checkpoint folder and check that its files, headers and index agree.

    Args:
        folder: a folder with `model.safetensors.index.json` and its shards, with a single `model.safetensors`, or
            with DeepSeek's `model{i}-mp{N}.safetensors`.
        layout: "inference" insists on DeepSeek's rank files where other safetensors lie beside them.

    Raises:
        CheckpointError: no checkpoint, a pickle, a damaged file, an index that points elsewhere or to nothing, a
            tensor that stands in two files or in none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is no folder" if folder.exists() else "does not exist"
        raise CheckpointError(state, file=folder, remedy="give the folder that holds config.json and the weights")
    names = sorted(entry.name for entry in folder.iterdir())
    config = read_config(folder)
    has_index, has_single = INDEX_NAME in names, SINGLE_NAME in names
    rank_files = [name for name in names if RANK_FILE.fullmatch(name)]
    if rank_files and (layout == "inference" or not (has_index or has_single)):
        return _open_ranks(folder, config, rank_files)
    if layout == "inference":
        raise CheckpointError("holds no model{i}-mp{N}.safetensors", file=folder, remedy="leave --from inference out")
    if has_index and has_single:
        problem = f"holds both {INDEX_NAME} and {SINGLE_NAME}, and readers disagree which one counts"
        raise CheckpointError(problem, file=folder, remedy="remove the one that is out of date")
    if has_index:
        return _open_indexed(folder, config)
    if has_single:
        path = safe_path(folder, SINGLE_NAME, named_by="the folder")
        checkpoint = Checkpoint(folder, "official", config, {SINGLE_NAME: read_header(path)})
        return _merge(checkpoint)
    raise _nothing_found(folder, names)


def open_weights(folder: Path) -> Checkpoint | None:
    """Open what transformers loads from a folder: `model.safetensors`, else what the index names; None for neither.

    Raises:
        CheckpointError: as `open_checkpoint`, and rank files, which transformers cannot load.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if SINGLE_NAME in names:
        header = read_header(safe_path(folder, SINGLE_NAME, named_by="the folder"))
        return _merge(Checkpoint(folder, "official", {}, {SINGLE_NAME: header}))
    if INDEX_NAME in names:
        return _open_indexed(folder, {})
    ranks = sorted(name for name in names if RANK_FILE.fullmatch(name))
    if ranks:
        remedy = "convert them first: deepseek-v3 convert SRC DST --to fp8 (or bf16)"
        raise CheckpointError("is a rank file of DeepSeek's inference code", file=folder / ranks[0], remedy=remedy)
    return None


def _nothing_found(folder: Path, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        problem = f"holds {shards[0]} but no {INDEX_NAME} that says what belongs together"
        return CheckpointError(problem, file=folder, remedy=f"add the index, or name a lone file {SINGLE_NAME}")
    if pickles:
        return CheckpointError("is a pickle, not safetensors", file=folder / pickles[0], remedy=_NO_PICKLE)
    return CheckpointError("holds no safetensors", file=folder, remedy="give the folder that holds the weights")


def _open_indexed(folder: Path, config: dict[str, Any]) -> Checkpoint:
    index_path = safe_path(folder, INDEX_NAME, named_by="the folder")
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        problem = "has no weight_map of tensor names to file names"
        raise CheckpointError(problem, file=index_path, remedy="download it again")
    if not weight_map:
        raise CheckpointError("names no tensors", file=index_path, remedy="download it again")
    files: dict[str, Header] = {}
    for name in sorted(set(weight_map.values())):
        path = safe_path(folder, name)
        if name.endswith(_PICKLES):
            raise CheckpointError("is a pickle, not safetensors", file=path, remedy=_NO_PICKLE)
        files[name] = read_header(path)
    checkpoint = _merge(Checkpoint(folder, "official", config, files))
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            problem = f"{INDEX_NAME} places it here, the file does not hold it"
            raise CheckpointError(problem, file=folder / name, tensor=tensor, remedy="download file and index again")
    for tensor, info in checkpoint.tensors.items():
        if tensor not in weight_map:
            problem = f"lies in the file and is missing from {INDEX_NAME}"
            raise CheckpointError(problem, file=info.file, tensor=tensor, remedy="download file and index again")
    return checkpoint


def _merge(checkpoint: Checkpoint) -> Checkpoint:
    """Fill `tensors` from the files, each name once, and recognise the fused layout."""
    tensors = checkpoint.tensors
    for header in checkpoint.files.values():
        for tensor, info in header.tensors.items():
            if tensor in tensors:
                problem = f"stands in {Path(tensors[tensor].file).name} as well"
                raise CheckpointError(problem, file=info.file, tensor=tensor, remedy="remove one of the two")
            tensors[tensor] = info
    if not tensors:
        raise CheckpointError("holds no tensors", file=checkpoint.folder, remedy="download it again")
    if any(tensor.endswith(_FUSED_MARK) for tensor in tensors):
        checkpoint.layout = "fused"
    return checkpoint


def _open_ranks(folder: Path, config: dict[str, Any], names: list[str]) -> Checkpoint:
    by_size: dict[int, set[int]] = {}
    for name in names:
        match = RANK_FILE.fullmatch(name)
        assert match is not None
        if name != rank_file(int(match[1]), int(match[2])):
            raise CheckpointError("numbers its rank with leading zeros", file=folder / name, remedy="rename it")
        by_size.setdefault(int(match[2]), set()).add(int(match[1]))
    if len(by_size) > 1:
        problem = f"holds shards of different model-parallel sizes {sorted(by_size)}"
        raise CheckpointError(problem, file=folder, remedy="keep the files of one size")
    (size, ranks), *_ = by_size.items()
    if len(ranks) != size or max(ranks) != size - 1:
        wanted = next((rank for rank in range(size) if rank not in ranks), size)
        problem = f"{len(ranks)} of {size} ranks are there"
        raise CheckpointError(problem, file=folder, remedy=f"add {rank_file(wanted, size)}")
    files = {rank_file(i, size): read_header(safe_path(folder, rank_file(i, size))) for i in range(size)}
    checkpoint = Checkpoint(folder, "inference", config, files)
    checkpoint.ranks = [header.tensors for header in files.values()]
    return checkpoint


def rank_file(rank: int, size: int) -> str:
    """DeepSeek's name of the shard of one rank."""
    return f"model{rank}-mp{size}.safetensors"
