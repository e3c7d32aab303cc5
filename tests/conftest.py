"""Shapes and types in annotations are checked while tests run."""

import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("synapse", "beartype.beartype")

# Tiny models gain nothing from threads, and lose much when other processes want the cores.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository; tests that need it are skipped without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no folder of real models and data beside the repository")
    return SHARED
