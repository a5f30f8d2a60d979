from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent/"shared"  # real data and models, where the machine has them


@pytest.fixture
def root(): return ROOT


@pytest.fixture
def real():
    "A folder of real data by name; the test is skipped where there is none."
    def folder(name):
        if not (SHARED/"data"/name).is_dir(): pytest.skip(f"no folder of real data named {name}")
        return str(SHARED/"data"/name)
    return folder
