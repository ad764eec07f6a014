"""Which checkpoint a killed run goes on from: Trainer takes the newest folder, also one that was half written."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

STATE = "trainer_state.json"
# As PEFT names them.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first, complete or not."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [(int(number), path) for path in found if (number := path.name.rpartition("-")[2]).isdecimal()]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_checkpoint(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest complete checkpoint; one line for each newer folder that is not.

    Args:
        folder: Trainer's output folder.
        say: takes the lines.
    """
    for path in checkpoints(folder):
        missing = _missing(path)
        if missing is None:
            return path
        say(f"{path} is half written ({missing}): passed over")
    return None


def _missing(folder: Path) -> str | None:
    """What a checkpoint lacks; Trainer writes its state last, so that one which can be read has all before it."""
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {STATE}"
    except ValueError:
        return f"{STATE} breaks off"
    # What remains of a folder that was being deleted.
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [ADAPTER if (folder / ADAPTER_CONFIG).is_file() else SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    sharded = any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("global_step*"))
    lacking = [name for name in [*names, "optimizer.pt", "scheduler.pt"] if not (folder / name).is_file()]
    return None if sharded or not lacking else f"no {lacking[0]}"
