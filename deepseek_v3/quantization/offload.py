"""Weights that a device map sends to the disk, written there as they are read.

Special about it: transformers builds a layer's stack of experts in memory and then saves it. A stack of true size is
larger than two shards, so here one expert after another goes straight to its place in the file that accelerate reads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.accelerate import get_device

from ..conversion.errors import CheckpointError
from ..conversion.header import build_header
from ..conversion.writer import FULL_DISK, write_all
from .stored import DTYPE_NAMES

READERS = min(4, os.cpu_count() or 1)


class OffloadedStacks:
    """The stacks of one `from_pretrained` that its device map places on the disk.

    Args:
        device_map: transformers', None for none.
        folder: the `offload_folder`, None for none: then nothing is offloaded here, and transformers says what to do.
        in_files: whether accelerate reads what is stored as the model wants it from the checkpoint's own files.
    """

    def __init__(self, device_map: Any, folder: str | None, *, in_files: bool) -> None:
        self.device_map, self.folder, self.in_files = device_map, folder, in_files
        # What accelerate is to know of each: where it lies, and its dtype.
        self.index: dict[str, dict[str, str]] = {}

    def takes(self, name: str) -> bool:
        """Whether the parameter belongs on the disk."""
        return self.folder is not None and get_device(self.device_map, name) == "disk"

    def write(self, name: str, shape: torch.Size, dtype: torch.dtype, part: Callable[[int], torch.Tensor]) -> None:
        """Write a stack.

        Args:
            name: the parameter's.
            shape: [E, ..].
            dtype: of what is written.
            part: gives the matrices of one expert, whole and in order, in `dtype` on the CPU; called from threads.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        assert self.folder is not None
        path = Path(self.folder) / f"{name}.safetensors"
        header, offsets, nbytes = build_header([(name, DTYPE_NAMES[dtype], tuple(shape))])
        size = (nbytes - len(header)) // shape[0]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another model may still read a file of this name.
            path.unlink(missing_ok=True)
            with path.open("wb") as file, ThreadPoolExecutor(READERS) as pool:
                write_all(file.fileno(), header, 0)

                def put(expert: int) -> None:
                    data = part(expert).contiguous().view(torch.uint8).numpy()
                    write_all(file.fileno(), data, offsets[name] + expert * size)

                for job in [pool.submit(put, expert) for expert in range(shape[0])]:
                    job.result()
        except OSError as error:
            path.unlink(missing_ok=True)
            reason = "the disk is full" if error.errno in FULL_DISK else (error.strerror or str(error))
            remedy = "free some space, or choose an offload_folder on another disk"
            raise CheckpointError(f"offloading failed: {reason}", file=path, tensor=name, remedy=remedy) from error
        dtype_name = str(dtype).removeprefix("torch.")
        self.index[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": dtype_name}
