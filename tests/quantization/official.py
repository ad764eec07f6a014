"""Checkpoints in the official FP8 layout at awkward sizes, and an independent reading of their files.

None of the sizes is a multiple of 128: 192 hidden columns, 112 + 32 rows of `kv_a_proj_with_mqa`,
experts of width 160, so that gate and up have block grids of their own.
"""

import json
import logging

import numpy
import torch
from safetensors import safe_open

from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint

AWKWARD = {
    "hidden_size": 192,
    "kv_lora_rank": 112,
    "q_lora_rank": 136,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 160,
    "intermediate_size": 200,
}


def awkward_config(**overrides):
    return preset("tiny", **{**AWKWARD, **overrides})


def write_fp8(folder, config=None, **kwargs):
    """An official FP8 folder, of the awkward configuration where none is given."""
    write_checkpoint(config or awkward_config(), folder, **kwargs)
    return folder


def stored(folder):
    """Every tensor of a folder's files, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}
    return tensors


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def dequantized(codes, scale):
    """The matrix that codes and scales stand for, element by element in float64: no rounding at all."""
    rows, columns = codes.shape
    blocks = scale.double().numpy()[numpy.arange(rows)[:, None] // 128, numpy.arange(columns)[None] // 128]
    return codes.float().double().numpy() * blocks


def logged(caplog):
    """What was logged at level WARNING or above, as one text."""
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def config_json(folder):
    return json.loads((folder / "config.json").read_text())
