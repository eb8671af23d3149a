"""Two processes of torchrun on a CPU: the objective and gradients of one, one folder, an end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_run import SCRIPTS, every_script, rows, start, weights

import common

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")


def torchrun(script, folder, *options):
    return start(script, folder, *options, environment=ONE_THREAD, launcher=TORCHRUN)


def finish(process):
    """(exit code, output, error) of a job."""
    out, error = process.communicate(timeout=90)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of every script the objective and gradients of two processes together and of one alone."""
    folder = tmp_path_factory.mktemp("found")
    command = [sys.executable, *TORCHRUN, ROOT / "tests" / "distributed.py", folder, *SCRIPTS]
    done = subprocess.run(
        command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {script: torch.load(folder / f"{script}.pt", weights_only=True) for script in SCRIPTS}


@every_script
def test_two_processes_find_the_gradients_of_one(script, found):
    for together, alone in zip(*found[script].values(), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


def children(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in listed.stdout.split()]


@every_script
def test_a_killed_process_ends_the_job_and_the_run_resumes(script, tmp_path):
    options = ("--epochs", "100000", "--no-eval", "--checkpoint-every", "0")
    process = torchrun(script, tmp_path, *options)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, _, error = finish(process)
    assert code != 0 and "SIGKILL" in error
    (path,) = (tmp_path / "runs").iterdir()
    done = common.load_checkpoint(path)["epoch"]
    assert done >= 1 and all(w.isfinite().all() for w in weights(path))
    # The options of a run are its own, --epochs alone may differ.
    resumed = ("--epochs", str(done + 2), *options[2:], "--resume", str(path))
    code, out, error = finish(torchrun(script, tmp_path, *resumed))
    assert code == 0, error
    assert out.count("run:") == 1
    assert [int(row["epoch"]) for row in rows(path)] == list(range(1, done + 3))
    assert float(rows(path)[-1]["objective"]) > float(rows(path)[0]["objective"])
    assert common.load_checkpoint(path)["epoch"] == done + 2


def test_the_batch_must_divide_among_the_processes(tmp_path):
    options = ("--batch-size", "15", "--no-eval")
    code, _, error = finish(torchrun("mopoe", tmp_path, *options))
    assert code != 0
    assert "--batch-size 15: must divide among 2 processes" in error
    assert not (tmp_path / "runs").exists()
