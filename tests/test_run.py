"""What every script promises of a run: its folder, its resumption, its answers to mistakes.

The tests are the same for all scripts; `tiny` is a data set that trains in milliseconds.
"""

import argparse
import csv
import dataclasses
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, STARTED
from tqdm import tqdm

import common
import datasets
import evaluate

SCRIPTS = ["mopoe", "mmvae", "mvae", "svae", "vaevae"]
CACHE = tempfile.TemporaryDirectory()  # the metrics' classifiers are trained once
PRIVATE = ["mopoe", "mmvae", "mvae"]  # have --private-dim
LIBRARIES = ["torch._dynamo", "matplotlib.pyplot", "sklearn.linear_model", "scipy.io", "tqdm"]
every_script = pytest.mark.parametrize("script", SCRIPTS)


def run(script, folder, *options, expect=0):
    """Run a script on `tiny` in this process; returns the run's folder (or None)."""
    argv = ["--runs-dir", str(folder / "runs"), "--cache-dir", CACHE.name, *options]
    if not any(option.startswith(("--dataset", "--resume")) for option in options):
        argv += ["--dataset", "tiny"]
    if expect:
        with pytest.raises(SystemExit) as stop:
            tiny.add_to(script).main(argv)
        assert stop.value.code == expect
    else:
        tiny.add_to(script).main(argv)
    runs = sorted((folder / "runs").glob("*"), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1] if runs else None


def resume(script, path, *options):
    saved = common.read_facts(path)["options"]
    tiny.add_to(script).main(
        ["--resume", str(path), "--runs-dir", saved["runs_dir"], "--cache-dir", saved["cache_dir"]]
        + list(options)
    )


# Processes are forked from one that has the libraries loaded, which is most of a start.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torchvision", "torch.utils.tensorboard", *LIBRARIES])


def start(script, folder, *options, first=None):
    """The same in a process of its own, its standard error in folder/error; `first` is called in it
    before."""
    options = ("--runs-dir", str(folder / "runs"), *options)
    process = FORKED.Process(target=in_a_process, args=(script, folder, options, first))
    process.start()
    STARTED.append(process)
    return process


def in_a_process(script, folder, options, first):
    os.dup2(os.open(folder / "error", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    if first:
        first()
    tiny.main(script, options)


def weights(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    optimizer = [t for s in state["optimizer"]["state"].values() for t in s.values()]
    return [*state["model"].values(), *optimizer]


def drawn(path):
    """The weights that are drawn at random to begin with."""
    state = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    return [w for name, w in state.items() if "coders" in name]


def assert_same_weights(one, other):
    for a, b in zip(weights(one), weights(other), strict=True):
        assert a.equal(b)


def method_of(script):
    """The method's class."""
    (method,) = (
        c
        for c in vars(tiny.add_to(script)).values()
        if getattr(c, "__module__", "") == script and hasattr(c, "objective")
    )
    return method


def another(script, monkeypatch):
    """{name: argv that gives an option another value than its default}, of all options."""
    parse, seen = common.parse, []
    monkeypatch.setattr(common, "parse", lambda p, *rest: seen.append(p) or parse(p, *rest))
    defaults, argv = vars(tiny.add_to(script).arguments(["--dataset", "tiny"])), {}
    for action in seen[0]._actions:
        option, default = action.option_strings[-1], defaults.get(action.dest)
        if isinstance(action, argparse.BooleanOptionalAction):
            argv[action.dest] = [action.option_strings[default is True]]
        elif action.nargs == 0:
            argv[action.dest] = [option]
        elif action.choices:
            argv[action.dest] = [option, next(c for c in action.choices if c != default)]
        elif action.dest == "dataset":
            argv[action.dest] = [option, "polydigits"]
        elif isinstance(default, float):
            argv[action.dest] = [option, str(0.5 * default + 0.1)]
        else:
            argv[action.dest] = [option, str(default + 2 if isinstance(default, int) else "x")]
    argv.pop("help")
    assert argv.keys() == defaults.keys()
    return argv


def rows(path):
    with open(path / "metrics.csv") as file:
        return list(csv.DictReader(file))


def scalars(path, name="objective"):
    """{epoch: value} of a name as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard reads files by name, where a tenth writer of one second comes before the ninth.
    files = sorted(path.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    for n, file in enumerate(files):
        file.rename(path / f"events.out.tfevents.{n:010}")
    log = EventAccumulator(str(path))
    log.Reload()
    return {event.step: event.value for event in log.Scalars(name)}


def one_line(capsys, *fragments):
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0, error
    assert "Traceback" not in error
    for fragment in fragments:
        assert fragment in error, error


# ------------------------------------------------------------------------------------ a run


@every_script
def test_a_run_leaves_what_it_promises(script, tmp_path, capsys):
    path = run(script, tmp_path)
    out = capsys.readouterr().out
    assert re.fullmatch(rf"tiny__{script}__0__\d{{8}}-\d{{6}}", path.name)
    assert str(path) in out and "made for tests" in out and "joint coherence" in out

    facts = json.loads((path / "args.json").read_text())
    assert facts["source"] == "made for tests" and facts["options"]["latent_dim"] == 3
    assert facts["threads"] == torch.get_num_threads() and facts["git"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] == "cpu"

    table = rows(path)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert list(table[0]) == [
        "epoch",
        "objective",
        "kl",
        "log_px/vector",
        "log_px/label",
        "tuples_per_second",
    ]
    assert float(table[-1]["objective"]) > float(table[0]["objective"])
    for name in table[0]:
        assert scalars(path, name) == {
            int(row["epoch"]): pytest.approx(float(row[name]), rel=1e-6) for row in table
        }

    results = json.loads((path / "results.json").read_text())
    subsets = ["vector", "label", "vector+label"]
    expected = {f"latent_accuracy/{s}" for s in subsets}
    likelihoods = {f"log_likelihood/{s}" for s in subsets}
    one = {f"{s}/{target}" for s in subsets for target in ("vector", "label")}
    likelihoods |= {f"{kind}/{key}" for kind in ("marginal", "conditional") for key in one}
    for prefix in ("", "standard_error/", "log_weight_variance/", "effective_samples/"):
        expected |= {prefix + key for key in likelihoods}
    expected -= {f"effective_samples/conditional/{key}" for key in one}
    expected |= {f"mixed_log_likelihood/{s}" for s in subsets}
    expected |= {f"coherence/{s}/{target}" for s in subsets for target in ("vector", "label")}
    expected |= {"coherence_by_inputs/1/without_inputs", "joint_coherence"}
    expected |= {"exact_match/vector/label"}
    expected |= {f"coherence_by_inputs/{n}/with_inputs" for n in (1, 2)}
    expected |= {f"classifier_accuracy/{name}" for name in ("vector", "label")}
    facts_of = dict(script=script, dataset="tiny", source="made for tests", epochs=3, seed=0)
    facts_of |= dict(latent_train=200, importance_samples=15, proposals="all")
    assert results.keys() == expected | facts_of.keys() | {"options", "trained_with"}
    assert facts_of.items() <= results.items() and results["options"]["latent_dim"] == 3
    assert not results["options"].keys() & {"runs_dir", "data_dir", "device", "seed"}

    pictures = {p.name for p in (path / "samples").iterdir()}
    assert pictures == {"reconstructions.png", "joint.png", "latents.png"} | {
        f"{kind}_{name}.png" for kind in ("from", "traverse") for name in ("vector", "label")
    }
    assert {p.name.split(".")[0] for p in path.iterdir()} == {
        "args",
        "checkpoint",
        "events",
        "metrics",
        "results",
        "samples",
    }


@every_script
def test_evaluating_a_saved_run_gives_the_same_results(script, tmp_path, capsys):
    path = run(script, tmp_path)
    first = (path / "results.json").read_text()
    table = capsys.readouterr().out.split("run:")[0]
    (path / "results.json").unlink()
    evaluate.main([str(path)])
    assert (path / "results.json").read_text() == first
    assert capsys.readouterr().out == table


@every_script
def test_an_option_of_the_evaluation_changes_its_own_numbers_only(script, tmp_path):
    path = run(script, tmp_path)

    def results(*options):
        evaluate.main([str(path), *options])
        return json.loads((path / "results.json").read_text())

    plain = results()
    for options, own in (
        (["--latent-train", "10"], r"latent_train|latent_accuracy/.*"),
        (["--importance-samples", "3"], r"importance_samples|.*(log_lik|marginal|condit).*"),
    ):
        found = results(*options)
        changed = {key for key in plain if found[key] != plain[key]}
        assert len(changed) > 1 and all(re.fullmatch(own, key) for key in changed)
    found = results("--proposals", "full")
    assert found.pop("proposals") == "full" and found.items() < plain.items()
    others = {f"log_likelihood/{name}" for name in ("vector", "label")}
    assert others == {
        key for key in plain.keys() - found.keys() if key.startswith("log_likelihood")
    }


def test_runs_are_drawn_side_by_side(tmp_path, capsys, monkeypatch):
    paths = [str(run(script, tmp_path, "--no-eval", "--epochs", "1")) for script in SCRIPTS]
    paths.append(str(run("mvae", tmp_path, "--no-eval", "--epochs", "1", "--weights", "label=9")))
    picture = tmp_path / "all.png"
    rows_from, given = evaluate.rows_from, []
    spy = lambda model, x, modality: given.append(modality.name) or rows_from(model, x, modality)
    with monkeypatch.context() as m:
        m.setattr(evaluate, "rows_from", spy)
        evaluate.main([*paths, "--side-by-side", str(picture), "--given", "label"])
    assert given == ["label"] * 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (Path(paths[0]) / "results.json").exists()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*paths, "--side-by-side", str(picture), "--given", "nothing"])
    assert stop.value.code == 2
    one_line(capsys, "--given nothing", "vector, label")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*paths, "--side-by-side", str(tmp_path / "no" / "folder.png")])
    assert stop.value.code == 2
    one_line(capsys, "folder.png")
    others = datasets.from_tensors(*[tiny.tuples(60, 3)] * 2, tiny.MODALITIES, "made for tests")
    data = iter([tiny.load(None), others])
    monkeypatch.setattr(datasets, "load", lambda args: next(data))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*paths[:2], "--side-by-side", str(picture)])
    assert stop.value.code == 2
    one_line(capsys, f"{paths[1]} is of other data than the first run")


@every_script
def test_the_seed_decides_everything(script, tmp_path):
    one, again = (run(script, tmp_path / name, "--no-eval") for name in ("one", "again"))
    other = run(script, tmp_path / "other", "--no-eval", "--seed", "1")
    assert_same_weights(one, again)
    assert not any(a.equal(b) for a, b in zip(drawn(one), drawn(other), strict=True))


@every_script
def test_the_seed_draws_the_weights_to_begin_with(script, tmp_path):
    still = ("--no-eval", "--epochs", "1", "--lr", "0")
    one, other = (run(script, tmp_path / seed, *still, "--seed", seed) for seed in "01")
    assert not any(a.equal(b) for a, b in zip(drawn(one), drawn(other), strict=True))


@every_script
def test_evaluation_does_not_disturb_training(script, tmp_path, monkeypatch):
    """Neither at the end nor on the way, where it sees training data only."""
    plain = run(script, tmp_path / "plain", "--no-eval")
    path = run(script, tmp_path / "evaluated", "--epochs", "2")
    resume(script, path, "--epochs", "3")
    assert_same_weights(plain, path)
    seen, original = [], evaluate.evaluate
    spy = lambda model, data, args: seen.append(data) or original(model, data, args)
    monkeypatch.setattr(evaluate, "evaluate", spy)
    path = run(script, tmp_path / "watched", "--no-eval", "--eval-every", "2")
    assert_same_weights(plain, path)
    (data,) = seen
    assert data.test.tensors is data.train.tensors and len(data.test) == len(data.train)
    assert data.test.batch(torch.arange(200))[0]["label"].equal(data.test.labels)
    assert scalars(path, "train/joint_coherence").keys() == {2}


@every_script
def test_runs_of_the_same_second_have_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.setattr(common.time, "strftime", lambda _: "20260101-000000")
    for _ in range(3):
        run(script, tmp_path, "--no-eval", "--epochs", "1")
    names = sorted(path.name.rsplit("__", 1)[1] for path in (tmp_path / "runs").iterdir())
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


@every_script
def test_options_work_together(script, tmp_path):
    options = ["--amp", "--epochs", "1", "--beta", "0", "--supervision", "0.1"]
    path = run(script, tmp_path, *options, *["--private-dim", "2"] * (script in PRIVATE))
    assert all(torch.isfinite(w).all() for w in weights(path))


@every_script
@pytest.mark.parametrize("supervision", ["1", "0.5"])
def test_each_stream_is_a_batch_of_its_own(script, supervision, tmp_path, monkeypatch):
    """The examples of a modality alone are never taken for tuples."""
    accelerate, trained = common.accelerate, []
    spy = lambda model, *rest: trained.append(model) or accelerate(model, *rest)
    monkeypatch.setattr(common, "accelerate", spy)
    run(script, tmp_path, "--no-eval", "--epochs", "1", "--supervision", supervision)
    streamed = supervision != "1" or script in ("svae", "vaevae")
    assert [isinstance(model, common.Streams) for model in trained] == [streamed]


@every_script
def test_weak_supervision_trains_on_all_data_and_resumes(script, tmp_path):
    options = ("--no-eval", "--supervision", "0.05")
    whole = run(script, tmp_path / "whole", *options)
    assert float(rows(whole)[-1]["objective"]) > float(rows(whole)[0]["objective"])
    path = run(script, tmp_path / "parts", *options, "--epochs", "1")
    resume(script, path, "--epochs", "3")
    assert_same_weights(whole, path)


@every_script
def test_values_that_are_not_kept_are_never_read(script, tmp_path, monkeypatch):
    """Other values in their place, NaN where there are floats, leave the run as it is."""
    options = ("--no-eval", "--keep", "0.6")
    whole = run(script, tmp_path / "whole", *options)
    with_gaps, hidden = datasets.with_gaps, []

    def overwritten(split, *args):
        split = with_gaps(split, *args)
        for i, t in enumerate(split.tensors.values()):
            t[~split.observed[:, i]] = math.nan if t.is_floating_point() else 0
        hidden.append((~split.observed).sum())
        return split

    monkeypatch.setattr(datasets, "with_gaps", overwritten)
    path = run(script, tmp_path / "overwritten", *options)
    assert hidden[0] > 100
    assert_same_weights(whole, path)
    for one, other in zip(rows(whole), rows(path), strict=True):
        assert {**one, "tuples_per_second": 0} == {**other, "tuples_per_second": 0}


# --------------------------------------------------------------------------------- resumption


@every_script
@pytest.mark.parametrize("done", [1, 2])
def test_resumed_is_bit_for_bit_the_uninterrupted_run(script, tmp_path, done):
    whole = run(script, tmp_path / "whole", "--no-eval")
    path = run(script, tmp_path / "parts", "--no-eval", "--epochs", str(done))
    resume(script, path, "--epochs", "3")
    assert_same_weights(whole, path)
    drop = "tuples_per_second"
    assert [{k: v for k, v in row.items() if k != drop} for row in rows(path)] == [
        {k: v for k, v in row.items() if k != drop} for row in rows(whole)
    ]
    assert scalars(path) == scalars(whole)
    assert common.read_facts(path)["options"]["epochs"] == 3


def test_an_unfinished_run_is_said_to_have_the_epochs_that_it_has(finished, tmp_path):
    path = Path(shutil.copytree(finished["mopoe"], tmp_path / "run"))
    facts = common.read_facts(path)
    facts["options"]["epochs"] = 9
    (path / "args.json").write_text(json.dumps(facts))
    assert evaluate.load_run(path)[2].epochs == common.load_checkpoint(path)["epoch"] == 1


@every_script
def test_checkpoints_are_apart_by_the_least_time_and_the_last_epoch_has_one(
    script, tmp_path, monkeypatch
):
    save, saved = common.save_checkpoint, []
    monkeypatch.setattr(common, "save_checkpoint", lambda *a: saved.append(a[3]) or save(*a))
    run(script, tmp_path, "--no-eval", "--epochs", "4")
    run(script, tmp_path, "--no-eval", "--epochs", "4", "--checkpoint-every", "0")
    assert saved == [1, 4, 1, 2, 3, 4]


@every_script
def test_logs_are_cut_to_the_checkpoint(script, tmp_path):
    """Epochs that were logged after the last checkpoint are logged once."""
    whole = run(script, tmp_path / "whole", "--no-eval")
    path = run(script, tmp_path / "parts", "--no-eval", "--epochs", "1")
    checkpoint = (path / "checkpoint.pt").read_bytes()
    resume(script, path, "--epochs", "2")
    (path / "checkpoint.pt").write_bytes(checkpoint)
    with open(path / "metrics.csv", "a") as file:
        file.write("3,half a li")
    resume(script, path, "--epochs", "3")
    assert [row["epoch"] for row in rows(path)] == ["1", "2", "3"]
    assert scalars(path) == scalars(whole)
    assert_same_weights(whole, path)


@every_script
def test_killed_or_stopped_at_any_moment_it_resumes(script, tmp_path):
    """SIGKILL at some moment after a checkpoint; Ctrl-C when it has gone on, which says how to."""
    options, endless = ("--checkpoint-every", "0", "--no-eval"), ("--epochs", "100000")
    resumed = ()
    for signal_number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(script, tmp_path, *options, *endless, *resumed)
        error = tmp_path / "error"
        while not list(tmp_path.glob("runs/*/checkpoint.pt")):
            assert process.is_alive(), error.read_text()
            time.sleep(0.01)
        (path,) = (tmp_path / "runs").iterdir()
        before = common.load_checkpoint(path)["epoch"] if resumed else 0
        while process.is_alive() and common.load_checkpoint(path)["epoch"] == before:
            time.sleep(0.001)
        os.kill(process.pid, signal_number)
        process.join(60)
        assert process.exitcode == code
        done = common.load_checkpoint(path)["epoch"]
        assert before < done
        resumed = ("--resume", str(path))
    assert "Traceback" not in error.read_text()
    assert f"go on with: python {script}.py --resume {path}" in error.read_text()
    all_epochs = ("--epochs", str(done + 1))
    resume(script, path, *options, *all_epochs)
    assert_same_weights(run(script, tmp_path / "whole", *options, *all_epochs), path)


def test_stopped_it_says_how_to_go_on_where_there_is_a_checkpoint(tmp_path, capsys, monkeypatch):
    def said():
        with pytest.raises(KeyboardInterrupt), common.interruptible(run):
            raise KeyboardInterrupt
        return shlex.split(capsys.readouterr().err.partition("go on with: ")[2])

    run = tmp_path / "a run's"  # to be quoted
    run.mkdir()
    monkeypatch.setattr(sys, "argv", ["mopoe.py"])
    assert said() == []
    (run / "checkpoint.pt").touch()
    assert said() == ["python", "mopoe.py", "--resume", str(run)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert said() == ["torchrun", "--nproc-per-node", "8", "mopoe.py", "--resume", str(run)]


def die_half_way():
    """From now on: killed in the middle of the third file written, the second checkpoint."""
    calls = []

    def die(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # args.json, the first checkpoint, the second
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    common.os.fsync = die


@every_script
def test_killed_while_a_checkpoint_is_written_the_old_one_stays(script, tmp_path):
    whole = run(script, tmp_path / "whole", "--no-eval")
    options = ("--no-eval", "--checkpoint-every", "0")
    process = start(script, tmp_path, *options, first=die_half_way)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "error").read_text()
    (path,) = (tmp_path / "runs").iterdir()
    assert len(list(path.glob(".checkpoint.pt.*"))) == 1
    assert common.load_checkpoint(path)["epoch"] == 1
    resume(script, path, *options)
    assert_same_weights(whole, path)
    assert not list(path.glob(".*"))


@every_script
def test_a_full_disk_keeps_the_old_checkpoint(script, tmp_path, capsys):
    path = run(script, tmp_path, "--no-eval", "--epochs", "1")
    before = (path / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow past this: the logs fit, a checkpoint does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
        with pytest.raises(SystemExit) as stop:
            resume(script, path, "--epochs", "2", "--no-eval")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert stop.value.code == 2
    one_line(capsys, "checkpoint.pt")
    assert (path / "checkpoint.pt").read_bytes() == before
    assert not list(path.glob(".*"))


def test_a_switch_that_a_data_set_turns_on_can_be_turned_off():
    turned_on = 0
    for script in map(importlib.import_module, SCRIPTS):
        for name, settings in script.DEFAULTS.items():
            for option in (key for key, value in settings.items() if value is True):
                off = "--no-" + option.replace("_", "-")
                args = script.arguments(["--dataset", name, off])
                assert getattr(args, option) is False
                turned_on += 1
    assert turned_on == 4  # MMVAE's learnt prior and AMSGrad, on mnist-svhn and cub


@every_script
def test_options_reach_model_and_optimiser(script, tmp_path):
    path = run(script, tmp_path, "--no-eval", "--epochs", "1", "--lr", "0.003", "--beta", "0.7")
    state, args = common.load_checkpoint(path), common.read_facts(path)["options"]
    _, *names = inspect.signature(getattr(sys.modules[script], state["class"])).parameters
    assert state["kwargs"] == {name: args[name] for name in names}
    (group,) = state["optimizer"]["param_groups"]
    assert group["lr"] == 0.003 and not group["amsgrad"]


@every_script
def test_every_option_of_a_model_is_what_it_is_built_with(script, tmp_path, monkeypatch):
    class Built(Exception):
        pass

    def build(modalities, **given):
        raise Built(given)

    method, options = method_of(script), another(script, monkeypatch)
    _, *names = inspect.signature(method).parameters
    monkeypatch.setattr(sys.modules[script], method.__name__, build)
    argv = ["--dataset", "tiny", *itertools.chain(*(options[n] for n in names))]
    with pytest.raises(Built) as built:
        run(script, tmp_path, *argv)
    (given,), asked = built.value.args, vars(sys.modules[script].arguments(argv))
    plain = vars(sys.modules[script].arguments(["--dataset", "tiny"]))
    assert given == {n: asked[n] for n in names}
    assert not any(asked[n] == plain[n] for n in names)


@every_script
def test_beta_weighs_what_is_logged_as_kl(script, tmp_path):
    still = ["--no-eval", "--epochs", "1", "--lr", "0"] + ["--objective", "elbo"] * (
        script == "mmvae"
    )
    without, with_it = (
        {k: float(v) for k, v in rows(run(script, tmp_path / b, *still, "--beta", b))[0].items()}
        for b in ("0", "2")
    )
    times = 3 if script in ("svae", "vaevae") else 1  # of the streams the mean
    assert with_it["kl"] == without["kl"] > 0.1
    difference = without["objective"] - with_it["objective"]
    assert difference == pytest.approx(2 * times * with_it["kl"], rel=1e-5)


def test_amsgrad_reaches_the_optimiser(tmp_path):
    path = run("mmvae", tmp_path, "--no-eval", "--epochs", "1", "--amsgrad")
    assert common.load_checkpoint(path)["optimizer"]["param_groups"][0]["amsgrad"]


@every_script
@pytest.mark.parametrize("amp", [False, True])
def test_amp_is_on_in_training_and_evaluation_or_in_neither(script, amp, tmp_path, monkeypatch):
    found, encoder = set(), common.encoder

    def watched(*args, **kwargs):
        net = encoder(*args, **kwargs)
        asked = torch.is_autocast_enabled
        net.register_forward_hook(lambda *_: found.add((torch.is_grad_enabled(), asked("cpu"))))
        return net

    monkeypatch.setattr(tiny.add_to(script), "encoder", watched)
    run(script, tmp_path, "--epochs", "1", *["--amp"] * amp)
    # The pictures are always drawn in float32.
    assert found == {(True, amp), (False, amp), (False, False)}


@every_script
def test_every_seed_epoch_and_process_has_rows_and_noise_of_its_own(script, tmp_path, monkeypatch):
    """The first and the second process of two, played one after the other: a row's value is here
    the number of its step, so that what is logged tells by how many rows the loss is divided."""
    batch, seen = datasets.Split.batch, []
    streams = 3 if script in ("svae", "vaevae") else 1

    def watched(split, part):
        seen.append((torch.initial_seed(), part.tolist()))
        return batch(split, part)

    def counting(model, *_):
        step = itertools.count(1)

        def call(x, observed=None):
            zero = 0 * sum(p.sum() for p in model.parameters())
            terms = dict.fromkeys(["kl", "log_px/vector", "log_px/label"], zero.detach())
            return zero + torch.full((8 * streams,), float(next(step))), terms

        return call

    monkeypatch.setattr(datasets.Split, "batch", watched)
    monkeypatch.setattr(common, "accelerate", counting)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    epochs = {}
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        place = torch.device("cpu"), rank, 2
        monkeypatch.setattr(common, "setup", lambda args, place=place: place)
        seen.clear()
        path = run(script, tmp_path, "--no-eval", "--epochs", "2", "--seed", str(seed))
        epochs[seed, rank] = seen[:12], seen[12:24]
        if rank == 0:  # the mean of the numbers 1 to 12, and 13 to 24
            objectives = [float(row["objective"]) for row in rows(path)]
            assert objectives == [streams * 6.5, streams * 18.5]
    found = [epoch for pair in epochs.values() for epoch in pair]
    assert len({noise for ((noise, _), *_) in found}) == len(found) == 6
    assert len({str([part for _, part in epoch]) for epoch in found}) == 6
    for one, other in zip(epochs[0, 0], epochs[0, 1], strict=True):
        for (_, a), (_, b) in zip(one, other, strict=True):
            assert not set(a[:8]) & set(b[:8])  # of the complete tuples no row is in both


@every_script
def test_supervision_is_the_share_of_complete_tuples_that_the_data_seed_chooses(
    script, tmp_path, monkeypatch
):
    batch, seen = datasets.Split.batch, []

    def watched(split, part):
        seen[-1].update(part[:16].tolist())
        return batch(split, part)

    monkeypatch.setattr(datasets.Split, "batch", watched)
    for seed in "001":
        seen.append(set())
        options = ["--no-eval", "--epochs", "1", "--supervision", "0.1", "--data-seed", seed]
        run(script, tmp_path, *options)
    assert len(seen[0]) == 20 and seen[0] == seen[1] != seen[2]


def test_a_row_has_the_means_over_steps_and_processes(monkeypatch):
    log = torch.tensor([[1.0], [3.0]])
    assert common.epoch_row(1, ["a"], log.clone(), 0.0, 1)["a"] == 2.0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(5))
    assert common.epoch_row(1, ["a"], log, 0.0, 1)["a"] == 3.5


def test_seeds_made_of_different_numbers_differ():
    numbers = [(*n, *zeros) for n in ((0,), (1,), (1, 2)) for zeros in ((), (0,), (0, 0))]
    assert len({common.seed_of(*n) for n in numbers}) == len(numbers)


@every_script
def test_what_may_differ_on_resumption(script, tmp_path, capsys):
    path = run(script, tmp_path, "--no-eval", "--epochs", "2")
    capsys.readouterr()
    for options, fragments in (
        (["--beta", "3"], ["--beta 3.0", "the run to resume has 1.0"]),
        (["--dataset", "polydigits"], ["--dataset polydigits", "tiny"]),
        (["--epochs", "1"], ["--epochs 1", "has done 2"]),
    ):
        with pytest.raises(SystemExit) as stop:
            resume(script, path, *options)
        assert stop.value.code == 2
        one_line(capsys, *fragments)
    resume(script, path, "--beta", "1.0", "--device", "cpu")  # the same value is no difference
    assert "all 2 epochs are done; --epochs N goes on to more" in capsys.readouterr().out
    elsewhere = ["--data-dir", "elsewhere", "--cache-dir", str(tmp_path / "cache"), "--no-eval"]
    resume(script, path, *elsewhere)


@every_script
def test_no_other_option_may_differ_on_resumption(script, finished, capsys, monkeypatch):
    options, path = another(script, monkeypatch), finished[script]
    monkeypatch.undo()
    for name in ("epochs", "device", "data_dir", "cache_dir", "no_eval", "resume"):
        options.pop(name)
    assert len(options) > 15
    for name, argv in options.items():
        with pytest.raises(SystemExit) as stop:
            resume(script, path, *argv)
        assert stop.value.code == 2
        one_line(capsys, f"--{name.replace('_', '-')} ", "the run to resume has")


def test_a_run_of_another_script_is_not_gone_on_with(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        resume("mvae", finished["mopoe"])
    assert stop.value.code == 2
    one_line(capsys, "is of another script or version than this", "subsets")


def test_a_fork_does_not_go_on_with_a_run_of_the_original(finished, tmp_path, capsys):
    path = Path(shutil.copytree(finished["mopoe"], tmp_path / "run"))
    state = torch.load(path / "checkpoint.pt") | {"script": "mymopoe"}
    torch.save(state, path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        resume("mopoe", path, "--epochs", "2")
    assert stop.value.code == 2
    one_line(capsys, "holds a MoPoE of mymopoe.py, not a MoPoE of mopoe.py")


def test_a_script_that_could_not_be_imported_is_not_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny.add_to("mopoe"), "__file__", "my-mopoe.py")
    assert run("mopoe", tmp_path, expect=2) is None
    one_line(capsys, "my-mopoe.py: its name must be a Python identifier, for evaluate.py")


@every_script
def test_the_log_is_by_name(script, tmp_path, monkeypatch):
    """A fork may give its terms in any order, and more of them."""
    method, logs = method_of(script), []
    forward = method.forward

    def other(model, *batch):
        value, terms = forward(model, *batch)
        return value, {"more": value.mean()} | dict(reversed(terms.items()))

    for i, stand_in in enumerate((forward, other)):
        monkeypatch.setattr(method, "forward", stand_in)
        path = run(script, tmp_path / str(i), "--no-eval", "--epochs", "1")
        (row,) = csv.DictReader((path / "metrics.csv").read_text().splitlines())
        logs.append({name: n for name, n in row.items() if name != "tuples_per_second"})
    assert logs[0] == logs[1]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_revision_says_what_is_in_no_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    original, fork = tmp_path / "common.py", tmp_path / "fork.py"
    monkeypatch.setattr(common, "__file__", str(original))
    original.write_text("")
    assert common.git_revision(original) == "unknown"
    git("init", "--quiet")
    git("add", "common.py")
    git("commit", "--quiet", "--message", "x")
    fork.write_text("")
    commit = common.git_revision(original)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert common.git_revision(fork) == commit + "-dirty"
    original.write_text("x = 1")
    assert common.git_revision(original) == commit + "-dirty"


# ------------------------------------------------------------------------ damaged checkpoints


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def damage(path, how):
    file = path / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    if how == "code":
        file.write_bytes(pickle.dumps(Code()))
    elif how == "code in a zip":
        torch.save(state | {"epoch": Code()}, file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("hello")
    elif how == "a tensor":
        torch.save(torch.ones(2), file)
    elif how == "missing keys":
        torch.save({k: v for k, v in state.items() if k != "optimizer"}, file)
    elif how == "missing weights":
        state["model"].popitem()
        torch.save(state, file)
    elif how == "other shapes":
        state["model"] = {k: torch.zeros(1) for k in state["model"]}
        torch.save(state, file)
    elif how == "another class":
        torch.save(state | {"class": "Module"}, file)
    elif how == "absent":
        file.unlink()


DAMAGES = [
    "code",
    "code in a zip",
    "truncated",
    "empty",
    "text",
    "a tensor",
    "missing keys",
    "missing weights",
    "other shapes",
    "another class",
    "absent",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of every script."""
    folder = tmp_path_factory.mktemp("finished")
    return {s: run(s, folder / s, "--no-eval", "--epochs", "1") for s in SCRIPTS}


def test_resumed_on_a_gpu_adam_can_be_captured(finished):
    """A CPU's run says that it need not be."""
    model, _, args = evaluate.load_run(finished["mopoe"])
    args.resume = finished["mopoe"]
    weights = sorted(model.parameters(), key=torch.numel, reverse=True)
    optimizer = torch.optim.Adam(weights, lr=9.0, fused=True, capturable=True)
    assert common.restore(args, model, optimizer) == 1
    (group,) = optimizer.param_groups
    assert group["capturable"] and group["lr"] == tiny.SETTINGS["lr"]


def test_moments_of_weights_in_another_order_are_refused(finished):
    """As a checkpoint has them from before large tensors came first."""
    model, _, args = evaluate.load_run(finished["mopoe"])
    args.resume = finished["mopoe"]
    with pytest.raises(common.UserError, match="its optimiser does not fit"):
        common.restore(args, model, torch.optim.Adam(model.parameters(), fused=True))


@every_script
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("reader", ["resume", "evaluate"])
def test_a_bad_checkpoint_is_refused_in_one_line(
    script, how, reader, finished, tmp_path, capsys, monkeypatch
):
    path = Path(shutil.copytree(finished[script], tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    damage(path, how)
    with pytest.raises(SystemExit) as stop:
        resume(script, path, "--epochs", "2") if reader == "resume" else evaluate.main([str(path)])
    assert stop.value.code == 2
    one_line(capsys, str(path))
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("empty", [torch.empty, np.empty], ids=["PyTorch", "NumPy"])
def test_memory_that_is_not_there_is_one_line(empty, capsys):
    with pytest.raises(SystemExit) as stop:
        common.command(lambda argv: empty((2**57,)))()
    assert stop.value.code == 2
    one_line(capsys, "the memory is full")

    def fault(argv):
        raise RuntimeError("of our own")

    with pytest.raises(RuntimeError, match="of our own"):
        common.command(fault)()


@pytest.mark.parametrize("full", [MemoryError, torch.OutOfMemoryError])
def test_full_memory_is_no_damaged_file(full):
    with pytest.raises(full), common.damaged("run/checkpoint.pt: is damaged"):
        raise full


@pytest.mark.parametrize(
    "fields, fragment",
    [
        ({"script": "os"}, "is not a file beside evaluate.py"),
        ({"script": "../mopoe"}, "is not a file beside evaluate.py"),
        ({"script": "datasets", "class": "UserError"}, "is no script that defines the class"),
        ({"script": "common", "class": "Streams"}, "is no script that defines the class"),
        ({"class": "encoder"}, "is no script that defines the class"),
        ({"kwargs": {"nonsense": 1}}, "does not fit"),
        ({"modalities": [{"name": "x"}]}, "does not fit"),
    ],
)
def test_only_a_plain_module_that_defines_the_class_is_imported(
    fields, fragment, finished, tmp_path, capsys
):
    path = Path(shutil.copytree(finished["mopoe"], tmp_path / "run"))
    torch.save(torch.load(path / "checkpoint.pt") | fields, path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(path)])
    assert stop.value.code == 2
    one_line(capsys, fragment)


@pytest.mark.parametrize("reader", ["resume", "evaluate"])
def test_a_data_set_that_is_no_more_is_named(reader, finished, tmp_path, capsys):
    path = Path(shutil.copytree(finished["mopoe"], tmp_path / "run"))
    facts = json.loads((path / "args.json").read_text())
    facts["options"]["dataset"] = "gone"
    (path / "args.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as stop:
        resume("mopoe", path, "--epochs", "2") if reader == "resume" else evaluate.main([str(path)])
    assert stop.value.code == 2
    one_line(capsys, "--dataset gone: is not one of")


def test_a_run_says_where_its_data_are_no_longer_those_it_was_trained_on(
    finished, tmp_path, capsys
):
    path = Path(shutil.copytree(finished["mopoe"], tmp_path / "run"))
    facts = json.loads((path / "args.json").read_text()) | {"source": "something else"}
    (path / "args.json").write_text(json.dumps(facts))
    evaluate.main([str(path)])
    assert f"{path} was trained on something else" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        resume("mopoe", path, "--epochs", "2")
    assert stop.value.code == 2
    one_line(capsys, "was trained on something else, here is made for tests")


def test_an_own_file_may_be_moved(tmp_path, capsys):
    arrays, old, new = {}, tmp_path / "own.npz", tmp_path / "there" / "own.npz"
    for part, n in (("train", 200), ("test", 60)):
        tensors, labels = tiny.tuples(n, n)
        arrays |= {f"{part}/{name}": t.numpy() for name, t in tensors.items()}
        arrays[f"{part}/labels"] = labels.numpy()
    np.savez(old, **arrays)
    small = ["--dataset", str(old), "--no-eval", "--epochs", "1", "--batch-size", "16"]
    path = run("mopoe", tmp_path, *small)
    new.parent.mkdir()
    old.rename(new)
    evaluate.main([str(path), "--data-dir", str(new.parent)])
    assert json.loads((path / "results.json").read_text())["dataset"] == "own.npz"
    assert "was trained on" not in capsys.readouterr().err


def test_a_run_is_not_evaluated_on_other_modalities(finished, capsys, monkeypatch):
    changed = [dataclasses.replace(m, scale=0.1) for m in tiny.MODALITIES]
    monkeypatch.setattr(tiny, "MODALITIES", changed)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(finished["mopoe"])])
    assert stop.value.code == 2
    one_line(capsys, "was trained on other modalities than those of made for tests")


def test_a_run_of_a_version_with_fewer_options_is_not_evaluated(finished, tmp_path, capsys):
    path = Path(shutil.copytree(finished["svae"], tmp_path / "run"))
    facts = json.loads((path / "args.json").read_text())
    del facts["options"]["weights"]
    (path / "args.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(path)])
    assert stop.value.code == 2
    one_line(capsys, "another version of svae.py, its options lack weights")


# ----------------------------------------------------------------------------------- mistakes

NONSENSE = [
    "",
    "x",
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "999999999999999999999",
    "é\n",
]
# What is no mistake after all; all other values of NONSENSE are.
ALLOWED = {
    "--eval-every": {"0"},
    "--beta": {"0", "1.5"},
    "--lr": {"0", "1.5"},
    "--seed": {"0"},
    "--data-seed": {"0"},
    "--private-dim": {"0"},
    "--random-subsets": {"0"},
    "--anneal-epochs": {"0"},
    "--checkpoint-every": {"0", "1.5"},
    "--data-dir": set(NONSENSE),  # not read for `tiny`
    "--cache-dir": set(NONSENSE),  # not read without evaluation
    "--backgrounds": set(NONSENSE),
    "--runs-dir": set(NONSENSE),  # any name of a folder will do
    "--resume": {""},
    "--weights": {""},
}


def options_of(script, capsys):
    """Every option that takes a value, from the help page."""
    with pytest.raises(SystemExit) as stop:
        tiny.add_to(script).main(["--help"])
    assert stop.value.code == 0
    return sorted(set(re.findall(r"^  (--[a-z-]+) [A-Z{]", capsys.readouterr().out, re.MULTILINE)))


@every_script
def test_nonsense_for_every_option_is_one_line(script, tmp_path, capsys):
    options = options_of(script, capsys)
    assert {"--dataset", "--beta", "--epochs", "--resume", "--device"} <= set(options)
    tried = 0
    for option in options:
        for value in NONSENSE:
            if value in ALLOWED.get(option, set()):
                continue
            argv = ["--no-eval", f"{option}={value}"]
            assert (
                run(
                    script,
                    tmp_path,
                    *(argv + ["--dataset", "tiny"] * (option != "--dataset")),
                    expect=2,
                )
                is None
            )
            one_line(capsys, option)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("script", ["svae", "vaevae"])
def test_stratified_terms_need_a_batch_of_all_subsets(script, tmp_path, capsys, monkeypatch):
    """polydigits' batch of 16 has fewer tuples than there are subsets of two to four of five."""
    argv = ["--dataset", "polydigits", "--no-eval", "--expectation", "stratified"]
    assert run(script, tmp_path, *argv, expect=2) is None
    one_line(capsys, "--expectation stratified: needs --batch-size 25 at least")
    monkeypatch.setattr(common, "setup", lambda args: (torch.device("cpu"), 0, 2))
    assert run(script, tmp_path, *argv, "--batch-size", "48", expect=2) is None
    one_line(capsys, "--expectation stratified: needs --batch-size 50 at least")


@every_script
@pytest.mark.parametrize(
    "options, fragments",
    [
        (["--dataset", "cifar"], ["--dataset", "cifar", "polydigits"]),
        (["--batch-size", "201"], ["--batch-size 201", "at most 200"]),
        (["--latent-dim", "two"], ["--latent-dim", "'two'", "whole number"]),
        (["--beta=-1"], ["--beta", "'-1'", "from 0 to 1,000,000"]),
        (["--seed=-1"], ["--seed", "'-1'", "from 0 to 4,294,967,295"]),
        (["--nonsense"], ["--nonsense"]),
        (["--epoch", "1"], ["--epoch"]),
        (["--resume", "nowhere"], ["nowhere", "is no run"]),
        (["--dataset", "polymnist", "--data-dir", "/dev/null"], ["/dev/null"]),
        (["--dataset", "polymnist", "--backgrounds", "nowhere"], ["--backgrounds nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    script, options, fragments, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(script, tmp_path, *options, expect=2) is None
    one_line(capsys, *fragments)
    assert list(tmp_path.iterdir()) == []


@every_script
def test_a_run_folder_that_cannot_be_written_is_named(script, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        tiny.add_to(script).main(["--dataset", "tiny", "--runs-dir", str(tmp_path / "runs")])
    assert stop.value.code == 2
    one_line(capsys, str(tmp_path / "runs"))


@every_script
def test_a_cache_folder_that_cannot_be_made_is_named_before_training(script, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert run(script, tmp_path, "--cache-dir", str(tmp_path / "cache"), expect=2) is None
    one_line(capsys, str(tmp_path / "cache"))


@every_script
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(script, tmp_path, capsys):
    assert run(script, tmp_path, "--device", "cuda", expect=2) is None
    one_line(capsys, "--device cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_is_kept_for_the_next_step():
    """Blocks of 128 MiB, more than glibc keeps by itself: their 32,768 pages are not mapped anew
    each time (at first they may be, until there is a place that fits)."""
    code = """
import resource, torch, common
common.tune_cpu()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) < 20 * 2**15


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="needs a CPU that can")
def test_denormal_numbers_are_zero_in_every_thread():
    """1e-40 is denormal in float32; a million of them are shared out among the threads."""
    code = """
import torch, common
common.tune_cpu()
torch.set_num_threads(4)
print(torch.full((2**20,), 1e-40).mul(0.5).count_nonzero().item())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) == 0


@every_script
def test_compilation_without_a_compiler_is_one_line(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(script, tmp_path, "--compile", "--device", "cpu", expect=2) is None
    one_line(capsys, "--compile: needs no-such-compiler", "--no-compile")


def test_a_gpus_compiler_is_asked_for(monkeypatch):
    """Triton builds its launchers in C."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    args = SimpleNamespace(compile="auto")
    with pytest.raises(common.UserError, match="--compile: needs gcc or clang.*see --no-compile"):
        common.accelerate(torch.nn.Identity(), args, torch.device("cuda"), 1)


@every_script
def test_a_value_that_is_not_finite_stops_the_run_before_the_checkpoint(
    script, tmp_path, capsys, monkeypatch
):
    path = run(script, tmp_path, "--no-eval", "--epochs", "1")
    before = (path / "checkpoint.pt").read_bytes()
    batch, calls = datasets.Split.batch, []

    def poisoned(split, rows):
        x, observed = batch(split, rows)
        calls.append(rows)
        return (x | {"vector": x["vector"] * torch.nan} if len(calls) == 5 else x), observed

    monkeypatch.setattr(datasets.Split, "batch", poisoned)
    with pytest.raises(SystemExit) as stop:
        resume(script, path, "--epochs", "2")
    assert stop.value.code == 2
    one_line(capsys, "epoch 2, step 5", "objective is nan")
    assert (path / "checkpoint.pt").read_bytes() == before
    assert len(rows(path)) == 1


@every_script
@pytest.mark.parametrize("poison", [math.nan, 1e30])  # 1e30 leaves the weights finite, not Adam's v
def test_weights_that_are_not_finite_never_become_a_checkpoint(
    script, poison, tmp_path, capsys, monkeypatch
):
    path = run(script, tmp_path, "--no-eval", "--epochs", "1")
    before = (path / "checkpoint.pt").read_bytes()
    adam, calls = torch.optim.Adam.step, []

    def poisoned(optimizer):
        calls.append(optimizer)
        if len(calls) == 200 // 16:  # the epoch's last step: its objectives are known by then
            optimizer.param_groups[0]["params"][-1].grad.fill_(poison)
        adam(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", poisoned)
    with pytest.raises(SystemExit) as stop:
        resume(script, path, "--epochs", "2")
    assert stop.value.code == 2
    one_line(capsys, "epoch 2", "not finite", "earlier checkpoints are kept")
    assert (path / "checkpoint.pt").read_bytes() == before


@every_script
def test_the_bar_counts_tuples_and_names_the_objective(script, tmp_path, monkeypatch):
    shown = io.StringIO()
    forced = dict(disable=False, file=shown)
    monkeypatch.setattr(common, "tqdm", lambda **options: tqdm(**options | forced))
    epoch_row, counted = common.epoch_row, []
    monkeypatch.setattr(common, "epoch_row", lambda *a: counted.append(a[-1]) or epoch_row(*a))
    path = run(script, tmp_path, "--no-eval", "--epochs", "1")
    resume(script, path, "--epochs", "2")
    assert counted == [192, 192]
    last = shown.getvalue().strip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("tiny: 100%") and "384/384" in last  # 2 epochs of 12 steps of 16
    assert f"epoch 2, objective {float(rows(path)[-1]['objective']):.1f}" in last


@every_script
def test_what_is_logged_is_what_is_optimised(script, tmp_path, monkeypatch):
    losses, backward = [], torch.Tensor.backward

    def recording(loss):
        losses.append(loss.item())
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", recording)
    path = run(script, tmp_path, "--no-eval", "--epochs", "1")
    assert float(rows(path)[0]["objective"]) == pytest.approx(-np.mean(losses), rel=1e-6)


@every_script
def test_training_never_sees_the_test_data_and_keeps_the_last_epoch(script, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "load", lambda args, load=tiny.load: without_test(load(args)))
    path = run(script, tmp_path, "--no-eval", "--eval-every", "2")
    assert torch.load(path / "checkpoint.pt", weights_only=True)["epoch"] == 3


def without_test(data):
    return dataclasses.replace(data, test=None)


@pytest.mark.parametrize(
    "fields, fragment",
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"shape": (3, 0)}, "shape is (3, 0)"),
        ({"shape": (2.5,)}, "shape is (2.5,)"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson', must be one of laplace"),
        ({"likelihood": "categorical"}, "categories is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"network": "resnet"}, "network is 'resnet', must be one of linear"),
        ({"network": "conv"}, "network 'conv' needs larger images (channels, height, width)"),
    ],
)
def test_an_own_modality_that_cannot_be_is_one_line(
    fields, fragment, tmp_path, capsys, monkeypatch
):
    def load(args):
        settings = {"name": "x", "shape": (4,), "network": "linear"} | fields
        return tiny.load(args).__class__(
            *[tiny.load(args).train] * 2, [common.Modality(**settings)], ""
        )

    tiny.add_to("mopoe")
    monkeypatch.setitem(datasets.LOADERS, "tiny", load)
    with pytest.raises(SystemExit) as stop:
        sys.modules["mopoe"].main(["--dataset", "tiny", "--runs-dir", str(tmp_path / "runs")])
    assert stop.value.code == 2
    one_line(capsys, fragment)
    assert list(tmp_path.iterdir()) == []
