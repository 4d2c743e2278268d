"""Shared fixtures."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE / name) for name in (".", "policy", "methods", "evaluation")
]  # helpers are imported by name

import toys  # noqa: E402
from speeds import pytest_collection_modifyitems  # noqa: E402, F401


@pytest.fixture(autouse=True)
def one_thread():
    """Toy models are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture
def llama():
    """A model of the test's own: transformers leaves hooks on one whose hidden states were read."""
    return toys.toy("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return toys.toy_tokenizer()


@pytest.fixture(params=toys.FAMILIES)
def family(request) -> str:
    """Every supported family: for the model itself and for attribution."""
    return request.param


@pytest.fixture(params=toys.LAYOUTS)
def layout(request) -> str:
    """One family per way of storing parameters: where only that matters."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama checkpoint folder; treat as read-only."""
    return toys.save_toy(tmp_path_factory.mktemp("checkpoint"))
