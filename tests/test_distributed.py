"""Two processes of torchrun on a CPU: the objective and gradients of one, one folder, an end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, STARTED
from test_run import SCRIPTS, every_script, one_line, resume, rows, run, weights

import common

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")


def torchrun(file, *arguments):
    command = [*TORCHRUN, str(ROOT / "tests" / file), *map(str, arguments)]
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **piped)
    STARTED.append(process)
    return process


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder and the output of one job in which two processes did for every script what
    distributed.py says."""
    folder = tmp_path_factory.mktemp("job")
    process = torchrun("distributed.py", folder, *SCRIPTS)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return folder, out


@every_script
def test_two_processes_find_the_gradients_of_one(script, job):
    folder, _ = job
    found = torch.load(folder / f"{script}.pt", weights_only=True)
    for together, alone in zip(found["together"], found["alone"], strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


@every_script
def test_two_processes_write_one_run_and_resume_it(script, job):
    folder, out = job
    (path,) = (folder / "runs").glob(f"tiny__{script}__*")
    assert out.count(f"run: {path}\n") == 2
    assert [int(row["epoch"]) for row in rows(path)] == [1, 2, 3]
    assert float(rows(path)[-1]["objective"]) > float(rows(path)[0]["objective"])
    assert common.load_checkpoint(path)["epoch"] == 3


def children(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in listed.stdout.split()]


@every_script
def test_a_killed_process_ends_the_job_and_the_run_resumes(script, tmp_path):
    options = ("--no-eval", "--checkpoint-every", "0")
    folder = ("--runs-dir", tmp_path / "runs", "--epochs", "100000")
    process = torchrun("tiny.py", script, *folder, *options)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in error
    (path,) = (tmp_path / "runs").iterdir()
    done = common.load_checkpoint(path)["epoch"]
    assert done >= 1 and all(w.isfinite().all() for w in weights(path))
    # By one process, which is enough to see that the folder is whole; by two it is tested above.
    resume(script, path, "--epochs", str(done + 2), *options)
    assert [int(row["epoch"]) for row in rows(path)] == list(range(1, done + 3))
    assert float(rows(path)[-1]["objective"]) > float(rows(path)[0]["objective"])
    assert common.load_checkpoint(path)["epoch"] == done + 2


@every_script
def test_the_batch_must_divide_among_the_processes(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(script, tmp_path, "--batch-size", "15", expect=2) is None
    one_line(capsys, "--batch-size 15: must divide among 2 processes")
