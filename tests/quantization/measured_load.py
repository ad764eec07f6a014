"""Run in a process of its own: load a folder and print the peak of resident memory above what was there before.

Usage: python measured_load.py FOLDER kept|dequantised|nf4|int8 SMALL_FOLDER
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_v3 import FP8Config


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(folder, how, small):
    wanted = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(how) or FP8Config(keep=how == "kept")
    # What the first load imports and allocates for good is not this load's.
    AutoModelForCausalLM.from_pretrained(small, quantization_config=wanted)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)
    size = model.get_memory_footprint()
    print(json.dumps({"peak": status("VmHWM") - before, "model": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
