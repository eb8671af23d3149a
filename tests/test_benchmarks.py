"""The benchmarks run, and say what they measured and where."""

import argparse
import importlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import evaluate

WHERE = {"command", "machine", "threads", "torch", "git"}


def found_by(command, folder):
    """What a benchmark writes."""
    name, *options = command.split()
    arguments = [str(ROOT / "benchmarks" / name), *options, "--json", "found.json"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_the_parts_of_a_whole_run_are_no_longer_than_it(tmp_path):
    found = found_by("whole_run.py mopoe --dataset digits-label --epochs 1", tmp_path)
    seconds = found["seconds"]
    assert found.keys() >= WHERE and {"imports", "epochs", "classifiers"} <= seconds.keys()
    # "the rest" is what they leave of the whole: negative where one is counted twice.
    assert min(seconds.values()) >= 0


def test_throughput_is_measured_and_its_floor(tmp_path):
    command = "throughput.py --methods mopoe --modes float32 --windows 1 --seconds 0.1"
    found = found_by(command, tmp_path)
    row = found["methods"]["mopoe"]["contenders"]["mopoe float32"]
    assert found["methods"]["mopoe"]["matrix_product_per_second"].keys() == {"float32"}
    assert found.keys() >= WHERE and row["tuples_per_second"] > 0 and row["peak_memory_gb"] > 0
    assert 0 < row["share_of_floor"] < 1


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("throughput")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0"])
def test_dreg_competes_compiled_where_mmvae_compiles_it(monkeypatch, throughput, version):
    monkeypatch.setattr(throughput, "peer_is_there", lambda: False)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    options, plain = argparse.Namespace(modes=throughput.MODES), list(throughput.MODES[:2])
    for method in ("mopoe", "mmvae-k1"):
        found = throughput.contenders_of(method, options)
        modes = plain if (method, version) == ("mmvae-k1", "2.11.0") else throughput.MODES
        assert found == [f"{method} {mode}" for mode in modes]


@pytest.mark.parametrize(
    "mistake",
    [
        "throughput.py --windows 0",
        "throughput.py --batch-size=-1",
        "throughput.py --seconds 0",
        "throughput.py --methods gan",
        "evaluation.py --tuples 9",
        "whole_run.py gan",
        "whole_run.py mopoe --resume",
    ],
)
def test_mistakes_in_a_benchmarks_options_are_one_line(mistake, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    name, *argv = mistake.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name.removesuffix(".py")).main(argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    assert argv[-1].split("=")[-1] in error


def test_the_rate_of_a_product_leaves_tf32_off(throughput):
    """Else what is measured next would not be in float32."""
    assert throughput.matrix_rate(torch.float32, torch.device("cpu"), 8) > 0
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_contender_that_dies_ends_the_others(throughput):
    options = argparse.Namespace(device="cpu", batch_size=2, latent_dim=2)
    waits, dies = (throughput.Contender(f"{name} float32", options) for name in ("mopoe", "none"))
    with pytest.raises(SystemExit, match="--contender none float32: ended early"):
        dies.seconds(1)
    assert waits.process.wait(timeout=60) != 0
    with pytest.raises(SystemExit, match="--contender mopoe float32: ended early"):
        waits.seconds(1)  # as it waited, its pipe is broken


def test_the_evaluations_parts_are_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    monkeypatch.setattr(evaluate, "JOINT_SAMPLES", 4)
    path = tmp_path / "found.json"
    options = ["--tuples", "20", "--modes", "float32", "--device", "cpu", "--json", str(path)]
    importlib.import_module("evaluation").main(options)
    found = json.loads(path.read_text())
    assert found.keys() >= WHERE and len(found["modes"]["float32"]) == 4
    assert all(0 < row["share_of_floor"] < 1 for row in found["modes"]["float32"].values())
