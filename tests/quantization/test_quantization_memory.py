"""Loading and saving hold the model and little beside it: measured in processes of their own on 200 MB of files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint

HERE = Path(__file__).parent
SHARDS = 6


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    config = preset(
        "tiny",
        hidden_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=32,
        num_nextn_predict_layers=1,
        num_hidden_layers=4,
        intermediate_size=2048,
    )
    return write_checkpoint(config, tmp_path_factory.mktemp("large") / "model", shards=SHARDS)


def run(script, *arguments):
    command = [sys.executable, HERE / script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("how", ["kept", "dequantised"])
def test_the_peak_stays_below_the_model_and_two_shards(how, large_folder, fp8_folder):
    sizes = [path.stat().st_size for path in large_folder.glob("*.safetensors")]
    assert len(sizes) == SHARDS and sum(sizes) > 200e6
    measured = run("measured_load.py", large_folder, how, fp8_folder)
    assert measured["model"] > sum(sizes) * (0.95 if how == "kept" else 1.9)
    assert measured["peak"] < measured["model"] + 2 * max(sizes), measured


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_saving_as_fp8_needs_less_than_two_shards_beside_the_model(large_folder, fp8_folder, tmp_path):
    shard = 40_000_000
    measured = run("measured_save.py", large_folder, tmp_path, fp8_folder, str(shard))
    sizes = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(sizes) > 4 and sum(sizes) > 200e6 and max(sizes) < shard * 1.01
    # One matrix as float32 and its parts, and what the allocator holds on to.
    assert measured["peak"] < 2 * shard, measured
