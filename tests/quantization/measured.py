"""Run in a process of its own: load and save folders and print the peaks of resident memory beyond what was there.

Usage: python measured.py ROOT [cuda], a folder with fp8, bf16, fused-fp8, fused-bf16 and small (FP8) in it; prints one
JSON object, a case each: on the CPU and the disk, or on a GPU and beside it.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_v3 import FP8Config

SAVED_SHARD = 20_000_000
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
HOW = {
    "kept": FP8Config(keep=True),
    "dequantised": FP8Config(keep=False),
    "bf16": None,
    "nf4": NF4,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# Name of a case -> folder, how it is loaded, whether most of it goes to the disk.
CASES = {
    "kept": ("fp8", "kept", False),
    "dequantised": ("fp8", "dequantised", False),
    "bf16": ("bf16", "bf16", False),
    "kept, on disk": ("fp8", "kept", True),
    "dequantised, on disk": ("fp8", "dequantised", True),
    "bf16, on disk": ("bf16", "bf16", True),
    "fused, kept": ("fused-fp8", "kept", False),
    "fused, dequantised": ("fused-fp8", "dequantised", False),
    "fused, bf16": ("fused-bf16", "bf16", False),
    "fused, kept, on disk": ("fused-fp8", "kept", True),
    "fused, dequantised, on disk": ("fused-fp8", "dequantised", True),
    "fused, bf16, on disk": ("fused-bf16", "bf16", True),
    "nf4 of bf16": ("bf16", "nf4", False),
    "nf4 of fp8": ("fp8", "nf4", False),
    "int8 of bf16": ("bf16", "int8", False),
    "nf4 of fused fp8": ("fused-fp8", "nf4", False),
}
# For each way to load FP8 and BF16 files: all on the GPU, or some layers in the CPU's memory.
GPU_CASES = {
    f"{folder}, {how}, {place}": (folder, how, place)
    for folder, how in (("fp8", "kept"), ("fp8", "dequantised"), ("bf16", "bf16"), ("fused-bf16", "bf16"))
    for place in ("all on the GPU", "half beside it")
}
HALF = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
HALF |= {"model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0}


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(action):
    """What `action` returns, and the most memory that it took beyond what was there before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier case gave back would hide what this one takes
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    result = action()
    return result, status("VmHWM") - before


def load(folder, how, offload=None, device_map="auto"):
    kwargs = {"quantization_config": HOW[how], "device_map": device_map}
    if offload:
        # All but the embedding and a dense layer: what is left in memory is next to nothing.
        limit = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        kwargs |= {"max_memory": {"cpu": limit}, "offload_folder": offload}
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


# What is saved -> how it is loaded, and how it is saved.
SAVES = {
    "save dequantised as fp8": ("dequantised", {"quantize": "fp8", "original": True}),
    "save dequantised": ("dequantised", {}),
    "save kept": ("kept", {}),
}


def save(root, folder, how, target, **options):
    """The peak of saving into `target`; with `original` it is the folder that was loaded."""
    model = load(root / folder, how)
    if how == "dequantised":
        # In memory of its own: nothing of the files, and nothing that training would not have in memory.
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").data.mul_(1.5)
    options |= {"original": root / folder} if "original" in options else {}
    return peak_of(lambda: model.save_pretrained(root / target, **options))[1]


def measure_gpu(root):
    results = {}
    for how in ("kept", "dequantised", "bf16"):
        load(root / "small", "kept" if how == "bf16" else how, device_map={"": 0})
    for case, (folder, how, place) in GPU_CASES.items():
        places = {"": 0} if place == "all on the GPU" else HALF
        model, peak = peak_of(lambda: load(root / folder, how, device_map=places))  # noqa: B023
        tensors = list(model.state_dict().values())
        results[case] = {
            "peak": peak,
            "on the GPU": sum(tensor.nbytes for tensor in tensors if tensor.is_cuda),
            # Brought to the GPU for each forward; the modules hold nothing meanwhile.
            "beside it": sum(tensor.nbytes for tensor in tensors if tensor.is_meta),
        }
        del model, tensors
    return results


def measure(root):
    results = {}
    # What the first load and save of a kind import and allocate for good is not theirs.
    for how in HOW:
        load(root / "small", "kept" if how == "bf16" else how, root / "warm-up" if how == "kept" else None)
    for case, (folder, how, on_disk) in CASES.items():
        model, peak = peak_of(lambda: load(root / folder, how, root / case if on_disk else None))  # noqa: B023
        tensors = model.state_dict().values()
        results[case] = {
            "peak": peak,
            "model": sum(tensor.nbytes for tensor in tensors if not tensor.is_meta),
            "on disk": sum(tensor.nbytes for tensor in tensors if tensor.is_meta),
        }
        del model, tensors
    for case, (how, options) in SAVES.items():
        save(root, "small", how, "saved-small", **options)
        results[case] = {"peak": save(root, "fp8", how, case, max_shard_size=SAVED_SHARD, **options)}
    return results


if __name__ == "__main__":
    print(json.dumps((measure_gpu if sys.argv[2:] == ["cuda"] else measure)(Path(sys.argv[1]))))
