"""Loading in 4 and in 8 bits holds the packed model and little beside it, whatever the files are: measured."""

from pathlib import Path

import pytest
from test_quantization_memory import run

from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint

SHARDS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Large checkpoints in BF16 and FP8, nine tenths of them routed experts, and small ones."""
    root = tmp_path_factory.mktemp("packed")
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 40, "num_hidden_layers": 2}
    large = preset("tiny", **sizes, num_nextn_predict_layers=1, intermediate_size=1024)
    for kind in ("bf16", "fp8"):
        write_checkpoint(large, root / kind / "large", shards=SHARDS, quantized=kind == "fp8")
        write_checkpoint(preset("tiny"), root / kind / "small", quantized=kind == "fp8")
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(("how", "kind", "share"), [("nf4", "bf16", 0.3), ("nf4", "fp8", 0.6), ("int8", "bf16", 0.54)])
def test_the_peak_stays_below_the_packed_model_and_two_shards(how, kind, share, folders):
    sizes = [path.stat().st_size for path in (folders / kind / "large").glob("*.safetensors")]
    assert len(sizes) == SHARDS and sum(sizes) > 100e6
    measured = run("measured_load.py", folders / kind / "large", how, folders / kind / "small")
    assert measured["model"] < share * sum(sizes)
    assert measured["peak"] < 1.15 * measured["model"] + 2 * max(sizes), measured
