from pathlib import Path

import pytest
from fabricated_run import build_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return build_run(tmp_path / "run")
