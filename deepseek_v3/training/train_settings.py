"""The settings of `deepseek-v3 train`: one list of options for the command line, for --config files and for Python.

Nothing here imports torch: the command's help comes at once.
"""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

PRECISIONS = ("fp32", "bf16", "fp8")
OPTIMIZERS = ("adamw", "adamw-bf16")
SCHEDULES = ("cosine", "report")
REPORTS = ("none", "tensorboard")
SCALES = ("float32", "ue8m0")
STEPS, WARMUP = 400, 40


def _option(default: Any, help: str, **details: Any) -> Any:
    metadata = {"help": help, **details}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainSettings:
    """Everything `train` needs. Each field is the option of its name, with `-` for `_` (`overrides` is `--set`);
    what an option does is its help. The defaults are a few minutes of two CPU cores."""

    data: list[str] = _option(list, "files with texts, and folders of .txt .py .md .jsonl .parquet", metavar="PATH")
    output: str = _option("", "folder for the model, its tokenizer, checkpoints, logs and loss.png")
    model: str = _option("small", "preset, or a model folder to go on with")
    overrides: dict[str, Any] = _option(
        dict, "a preset's configuration fields, as JSON values", option="set", metavar="FIELD=VALUE"
    )
    tokenizer: str | None = _option(None, "tokenizer folder (default: the model folder's, or a new one)")
    vocab_size: int = _option(4096, "of a new tokenizer")
    tokenizer_bytes: int = _option(10_000_000, "of a stream: how much text a new tokenizer is trained on")
    limit_bytes: int | None = _option(None, "read at most so much text")
    held_out: float = _option(0.03, "share of files (of a stream's texts, of rows) not trained on")
    stream: bool = _option(False, "read the data while training; needs --steps")
    shuffle_buffer: int = _option(1000, "of a stream: texts that are shuffled together; 0 keeps the files' order")
    mask_documents: bool = _option(False, "keep attention and MTP inside of documents")
    block: int = _option(256, "tokens in a block")
    batch: int = _option(8, "blocks in a forward")
    accumulation: int = _option(1, "forwards in a step")
    steps: int | None = _option(None, f"optimizer steps (default: {STEPS}; none for a stream)")
    schedule: str = _option(
        "cosine", "cosine to a tenth, or the report's learning rate, gamma and lambda", choices=SCHEDULES
    )
    learning_rate: float = _option(3e-3, "peak")
    warmup: int | None = _option(None, f"steps of warm-up (default: {WARMUP}; the report's share for its schedule)")
    batch_ramp: list[int] | None = _option(
        None,
        "blocks in the first and the last step, and blocks until the last; with --schedule report",
        metavar=("FIRST", "LAST", "SEQUENCES"),
    )
    optimizer: str = _option("adamw", "adamw-bf16 keeps its moments in BF16", choices=OPTIMIZERS)
    precision: str = _option("fp32", "of the products; weights stay float32", choices=PRECISIONS)
    scale_fmt: str = _option("float32", "of FP8's scales; ue8m0 are powers of two", choices=SCALES)
    fp8_statistics: int = _option(0, "log what FP8 loses every so many steps; 0 never")
    seed: int = _option(0, "of initialisation, data order and dropout")
    activation_checkpointing: bool = _option(False, "recompute layers in the backward")
    log_steps: int | None = _option(None, "steps between two entries of the log (default: a fortieth of the steps)")
    eval_steps: int = _option(0, "measure on held-out text every so many steps, at the start and the end; 0 never")
    eval_bytes: int = _option(100_000, "how much held-out text to measure on during the run")
    report_to: str = _option("none", "also log there", choices=REPORTS)
    save_steps: int = _option(0, "checkpoint every so many steps; 0 never")
    resume: bool = _option(False, "go on from the newest complete checkpoint in --output")


def option_name(setting: Any) -> str:
    """What the command line and a --config file call a field of `TrainSettings`."""
    return str(setting.metadata.get("option", setting.name.replace("_", "-")))


def option_types() -> dict[str, Any]:
    """The type of each option, by its name."""
    hints = get_type_hints(TrainSettings)
    return {option_name(setting): hints[setting.name] for setting in fields(TrainSettings)}


def make_settings(config: dict[str, Any], given: dict[str, Any]) -> TrainSettings:
    """Settings from a file's options and those of the command line, by their names; the latter win.

    Fields of `set` are merged one by one.
    """
    merged = {**config, **given}
    if "set" in config and "set" in given:
        merged["set"] = {**config["set"], **given["set"]}
    names = {option_name(setting): setting.name for setting in fields(TrainSettings)}
    return TrainSettings(**{names[name]: value for name, value in merged.items()})


def read_config(file: str) -> dict[str, Any]:
    """The options in a YAML or JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither YAML nor JSON; an option that does not exist, or with a value of another type.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--config {file} does not exist")
    values = _parsed(path)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no options: write NAME: VALUE, with the names of the command line's options")
    types = option_types()
    for name in values:
        if name not in types:
            close = difflib.get_close_matches(str(name).replace("_", "-"), types, n=1)
            hint = f"; did you mean {close[0]}?" if close else f". There are {', '.join(types)}"
            raise ValueError(f"{file}: there is no option {name!r}{hint}")
    return {name: _checked(value, types[name], f"{file}: {name}") for name, value in values.items()}


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            return yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    raise ValueError(f"{path}: a configuration's name ends with .yaml, .yml or .json")


def _checked(value: Any, wanted: Any, where: str) -> Any:
    kinds = get_args(wanted) if get_origin(wanted) not in (list, dict) else ()
    if value is None and NoneType in kinds:
        return None
    wanted = next((kind for kind in kinds if kind is not NoneType), wanted)
    origin, inner = get_origin(wanted) or wanted, (get_args(wanted) or (None,))[0]
    if origin is float and isinstance(value, str):
        value = _number(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    good = isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
    if good and origin is list:
        good = all(isinstance(item, inner) and not isinstance(item, bool) for item in value)
    if not good:
        name = {list: f"a list of {getattr(inner, '__name__', inner)}", dict: "FIELD: VALUE pairs"}.get(
            origin, origin.__name__
        )
        raise ValueError(f"{where} = {value!r}: write {name}")
    return value


def _number(text: str) -> Any:
    """YAML 1.1 reads 3e-3, without a dot, as text."""
    try:
        return float(text)
    except ValueError:
        return text


def settled(settings: TrainSettings) -> TrainSettings:
    """The settings with what depends on other settings filled in.

    Raises:
        ValueError: a value, or two together, that cannot be.
    """
    from dataclasses import replace

    _check_values(settings)
    _check_pairs(settings)
    steps = STEPS if settings.steps is None else settings.steps
    warmup = WARMUP if settings.warmup is None and settings.schedule == "cosine" else settings.warmup
    log_steps = max(1, steps // 40) if settings.log_steps is None else settings.log_steps
    return replace(settings, steps=steps, warmup=warmup, log_steps=log_steps)


_LEAST = {"block": 2, "batch": 1, "accumulation": 1, "steps": 1, "log_steps": 1, "eval_bytes": 1, "tokenizer_bytes": 1}
_LEAST |= {"warmup": 0, "shuffle_buffer": 0, "fp8_statistics": 0, "eval_steps": 0, "save_steps": 0, "limit_bytes": 1}


def _check_values(settings: TrainSettings) -> None:
    for name, why in (("data", "files or folders of text"), ("output", "a folder for what comes out")):
        if not getattr(settings, name):
            raise ValueError(f"--{name} is missing: give {why}, on the command line or in --config")
    for setting in fields(settings):
        value, choices = getattr(settings, setting.name), setting.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"--{option_name(setting)} {value}: choose from {', '.join(choices)}")
        if value is not None and setting.name in _LEAST and value < _LEAST[setting.name]:
            raise ValueError(f"--{option_name(setting)} {value}: give at least {_LEAST[setting.name]}")
    if not 0 <= settings.held_out < 1:
        raise ValueError(f"--held-out {settings.held_out}: give a share from 0 to below 1")
    if settings.learning_rate <= 0:
        raise ValueError(f"--learning-rate {settings.learning_rate}: give a number above 0")
    if settings.batch_ramp is not None and len(settings.batch_ramp) != 3:
        raise ValueError(f"--batch-ramp {settings.batch_ramp}: give FIRST, LAST and SEQUENCES")


def _check_pairs(settings: TrainSettings) -> None:
    ramp = settings.batch_ramp is not None
    wrong = {
        "a stream has no known length: give --steps with --stream": settings.stream and settings.steps is None,
        "--limit-bytes does not go with --stream, which reads what --steps takes": (
            settings.stream and settings.limit_bytes is not None
        ),
        "--batch-ramp belongs to --schedule report": ramp and settings.schedule != "report",
        "--batch-ramp accumulates by itself: leave --accumulation out": ramp and settings.accumulation != 1,
        "--scale-fmt belongs to --precision fp8": settings.scale_fmt != "float32" and settings.precision != "fp8",
        "--fp8-statistics belongs to --precision fp8": settings.fp8_statistics > 0 and settings.precision != "fp8",
        "--eval-steps measures on held-out text: give --held-out above 0": (
            settings.eval_steps > 0 and settings.held_out == 0
        ),
    }
    for message, found in wrong.items():
        if found:
            raise ValueError(message)


def as_options(settings: TrainSettings) -> dict[str, Any]:
    """The settings by the options' names, as a --config file holds them."""
    return {option_name(setting): getattr(settings, setting.name) for setting in fields(settings)}
