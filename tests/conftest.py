import os
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent/"shared"  # real data and models, where the machine has them
FIRST = ("test_a_clean_environment_runs_the_wheel", "test_chapter", "test_smoke")  # the longest; what is short comes last, so that the processes end together
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each process that tests; read when torch is imported


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.name.split("[")[0], len(FIRST)))


@pytest.fixture
def root(): return ROOT


@pytest.fixture
def real():
    "A folder of real data by name; the test is skipped where there is none."
    def folder(name):
        if not (SHARED/"data"/name).is_dir(): pytest.skip(f"no folder of real data named {name}")
        return str(SHARED/"data"/name)
    return folder


@pytest.fixture(scope="module")
def blobs():
    "Three classes that are told apart easily, 150 rows of 6 numbers."
    import torch  # late: the number of its threads is set above
    y = torch.arange(150) % 3
    return torch.randn(150, 6, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(6)[y], y


@pytest.fixture
def peak():
    "The most bytes of tensors that were alive at once while a function ran, beyond those before it."
    from torch.profiler import ProfilerActivity, profile
    def most(work):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: work()
        now, highest = 0, 0
        for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            highest = max(highest, now)
        return highest
    return most
