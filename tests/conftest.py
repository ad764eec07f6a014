"""What every test shares: no network, a small model, some tokens."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from twins import make_model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokens():
    return torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(7))
