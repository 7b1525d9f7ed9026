"""What every test on a GPU begins with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float32_products():
    """Products of float32 in float32, whatever the environment asks for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
