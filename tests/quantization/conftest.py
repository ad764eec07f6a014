"""Small official checkpoints, made once for all tests of this folder and never changed."""

import pytest
from official import write_fp8
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config


@pytest.fixture(scope="session")
def fp8_folder(tmp_path_factory):
    """Five shards; weights and their scales in different ones."""
    return write_fp8(tmp_path_factory.mktemp("fp8") / "model", shards=5)


@pytest.fixture
def kept(fp8_folder):
    return AutoModelForCausalLM.from_pretrained(fp8_folder, quantization_config=FP8Config(keep=True))


@pytest.fixture
def plain(fp8_folder):
    """The same model dequantised; its experts run one by one, as the kept ones do."""
    return AutoModelForCausalLM.from_pretrained(
        fp8_folder, quantization_config=FP8Config(keep=False), experts_implementation="eager"
    )
