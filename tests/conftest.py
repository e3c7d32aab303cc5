"""Shapes and types in annotations are checked while tests run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("synapse", "beartype.beartype")

# Tiny models gain nothing from threads, and lose much when other processes want the cores.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of recordings of the tests' own: nothing is written into the user's, and nothing found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNAPSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository; tests that need it are skipped without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no folder of real models and data beside the repository")
    return SHARED
