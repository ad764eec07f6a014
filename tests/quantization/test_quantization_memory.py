"""Loading and saving hold the model and little beside it, on the disk or packed too: measured in one fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measured import CASES, GPU_CASES, SAVED_SHARD, SAVES, load

from deepseek_v3.configuration import preset
from deepseek_v3.conversion import convert, write_checkpoint

HERE = Path(__file__).parent
# Of the bytes of the files, what the model itself takes in memory or on the disk.
SHARES = {"kept": (0.95, 1), "dequantised": (1.9, 2), "bf16": (0.98, 1)}
PACKED = {"nf4 of bf16": 0.3, "nf4 of fp8": 0.6, "int8 of bf16": 0.54, "nf4 of fused fp8": 0.6}
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model of which nine tenths are routed experts; a stack of them is larger than two shards, as at true size, and
    no smaller than one where the files hold stacks."""
    root = tmp_path_factory.mktemp("measured")
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 40, "num_hidden_layers": 2}
    write_checkpoint(
        preset("tiny", **sizes, num_nextn_predict_layers=1, intermediate_size=1024), root / "fp8", shards=4
    )
    convert(root / "fp8", root / "bf16", "bf16", shard_bytes=34_000_000, workers=0)
    convert(root / "bf16", root / "fused-bf16", "fused", shard_bytes=90_000_000, workers=0)
    kept = load(root / "fp8", "kept")
    kept.save_pretrained(root / "fused-fp8", save_original_format=False, max_shard_size="45MB")
    write_checkpoint(preset("tiny"), root / "small", shards=1)
    return root


@pytest.fixture(scope="module")
def measured(root):
    return run(root)


def run(*arguments):
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "measured.py", *arguments]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def sizes(folder):
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


@pytest.mark.parametrize("case", [case for case in CASES if case not in PACKED])
def test_the_peak_stays_below_the_model_and_two_shards(case, root, measured):
    files, found = sizes(root / CASES[case][0]), measured[case]
    least, most = SHARES[CASES[case][1]]
    assert sum(files) > 125e6 and len(files) >= 4, files
    assert least * sum(files) < found["model"] + found["on disk"] < most * sum(files)
    assert found["on disk"] > 8 * found["model"] if CASES[case][2] else not found["on disk"]
    assert found["peak"] < found["model"] + 2 * max(files), found


@pytest.mark.parametrize("case", PACKED)
def test_the_peak_stays_below_the_packed_model_and_two_shards(case, root, measured):
    files, found = sizes(root / CASES[case][0]), measured[case]
    assert found["model"] < PACKED[case] * sum(files)
    assert found["peak"] < 1.15 * found["model"] + 2 * max(files), found


@pytest.mark.parametrize("case", SAVES)
def test_saving_needs_less_than_two_shards_beside_the_model(case, root, measured):
    files = sizes(root / case)
    assert len(files) > 4 and sum(files) > 125e6 and max(files) < SAVED_SHARD * 1.01
    # One matrix as float32 and its parts, and what the allocator holds on to.
    assert measured[case]["peak"] < 2 * SAVED_SHARD, measured[case]


@pytest.mark.gpu
def test_beside_a_gpu_the_host_holds_its_layers_and_two_shards(root):
    for case, found in run(root, "cuda").items():
        files, (_, how, place) = sizes(root / GPU_CASES[case][0]), GPU_CASES[case]
        least, most = SHARES[how]
        assert least * sum(files) < found["on the GPU"] + found["beside it"] < most * sum(files), (case, found)
        assert (found["beside it"] > 0.4 * sum(files)) == (place == "half beside it"), (case, found)
        assert found["peak"] < found["beside it"] + 2 * max(files), (case, found)
