"""Small checkpoints in every layout, made once for all tests of this folder."""

import shutil
from pathlib import Path

import pytest
from checkpoint_files import CONFIG

from deepseek_v3.configuration.presets import PRESETS
from deepseek_v3.conversion import convert, write_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders, made once and never changed: fp8, ue8m0, bf16 (dequantised fp8), fused, inference (2 ranks, MTP)."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(CONFIG, root / "fp8", shards=4, seed=1)
    write_checkpoint(CONFIG, root / "ue8m0", shards=3, scale_fmt="ue8m0", seed=2)
    convert(root / "fp8", root / "bf16", "bf16", workers=0)
    convert(root / "fp8", root / "fused", "fused", workers=0)
    convert(root / "fp8", root / "inference", "inference", model_parallel=2, keep_mtp=True, workers=0)
    return root


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """DeepSeek-V3 itself in 163 files: true headers, no data."""
    folder = tmp_path_factory.mktemp("published") / "deepseek-v3"
    return write_checkpoint(PRESETS["deepseek-v3"], folder, shards=163, sparse=True)


@pytest.fixture
def copy(made, tmp_path):
    """A function that copies one of `made` into this test's own folder."""

    def make(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return make
