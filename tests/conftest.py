import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

if torch.cuda.is_available():
    torch.cuda.init()
    torch.cuda.device_count()  # once it is initialised, this process remembers its GPUs,
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # and those that tests start have none


@pytest.fixture
def gpu():
    """For a test on a GPU; all others run on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    if "gpu" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def float64():
    """Exact tests run in double precision."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def fixed_noise(monkeypatch):
    """The noise of every call is the same function of the shape."""

    def randn_like(t):
        return torch.randn(t.shape, generator=torch.Generator().manual_seed(5)).to(t)

    monkeypatch.setattr(torch, "randn_like", randn_like)


@pytest.fixture(scope="session")
def data_dir():
    """The folder with real MNIST, for the tests that need it."""
    folder = Path(os.environ.get("MULTIMODAL_DATA", ROOT / "data"))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {folder}; set MULTIMODAL_DATA to test on real data")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


STARTED = []  # the processes of the running test


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    yield
    while STARTED:
        process = STARTED.pop()
        process.terminate()  # lets torchrun end its workers
        try:
            process.wait(10) if isinstance(process, subprocess.Popen) else process.join(10)
        except subprocess.TimeoutExpired:
            pass
        process.kill()
