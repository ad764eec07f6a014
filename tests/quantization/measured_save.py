"""Run in a process of its own: save a model as FP8 and print the peak of resident memory above the model's.

Usage: python measured_save.py FOLDER TARGET SMALL_FOLDER SHARD_SIZE
"""

import json
import sys
from pathlib import Path

from measured_load import status
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config


def save(folder, target, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(keep=False))
    # In memory of its own: nothing of the files, and nothing that training would not have in memory.
    model.get_parameter("model.layers.0.self_attn.o_proj.weight").data.mul_(1.5)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    model.save_pretrained(target, quantize="fp8", original=folder, **options)
    return status("VmHWM") - before


def main(folder, target, small, shard):
    # What the first save imports and allocates for good is not this save's.
    save(small, Path(target) / "small")
    print(json.dumps({"peak": save(folder, Path(target) / "large", max_shard_size=int(shard))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
