"""A small model's configuration, and ways to read, make and damage checkpoint folders without the package."""

import json
import struct
from pathlib import Path

from safetensors import safe_open

from deepseek_v3.cli import main

# Every dimension that is cut for two ranks holds whole pairs of FP8 blocks; kv_a_proj has 192 rows, q_b_proj 160
# columns: one and a half and one and a quarter blocks.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "vocab_size": 264,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 160,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def read_all(folder):
    """Every tensor of a folder by name, through the safetensors library."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    return tensors


def snapshot(folder):
    """File name -> bytes, without the note that tells a finished conversion from another one."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name != ".converted.json"}


def edit_header(path, change):
    """Apply `change` to the header's dictionary and write the file back with its data untouched."""
    raw = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def write_raw(path, tensors):
    """A safetensors file from name -> (dtype, shape, bytes), made without the package."""
    table, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(table).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def command(*words):
    """Run the command line in this process: its exit code."""
    return main([str(word) for word in words])
