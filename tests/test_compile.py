"""What a GPU runs by default, torch.compile and one CUDA graph a step, is the step as written."""

import argparse
import contextlib
import csv
import types

import pytest
import tiny
import torch
from exact import five

import common
import mmvae
from mmvae import MMVAE
from mopoe import MoPoE
from mvae import MVAE
from svae import SVAE
from vaevae import VAEVAE

STREAMS = dict(streams=True)
KINDS = {
    "mvae": (MVAE, {}, {}),
    "mvae quotient": (MVAE, dict(product="quotient", private_dim=2), {}),
    "mopoe": (MoPoE, {}, {}),
    "mopoe all mixture": (MoPoE, dict(expectation="all", kl="mixture", private_dim=2), {}),
    **{f"mmvae {name}": (MMVAE, dict(objective=name, K=2), {}) for name in mmvae.OBJECTIVES},
    "svae": (SVAE, {}, STREAMS),
    "svae stratified": (SVAE, dict(expectation="stratified"), STREAMS),
    "vaevae": (VAEVAE, {}, STREAMS),
    "vaevae stratified": (VAEVAE, dict(joint="poe", expectation="stratified"), STREAMS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_as_uncompiled(float64, kind):
    """Through Dynamo and AOTAutograd, without the code generator, so that the noise is the same."""
    make, options, streams = KINDS[kind]
    mods, x = five()
    mods = mods[:3]
    x = {m.name: x[m.name][torch.arange(24) % 6] for m in mods}
    model, found = make(mods, 3, beta=1.3, **options), []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(1)
        model.zero_grad()
        value, terms = call(x, None, **streams)
        value.sum().backward()
        found.append([value, *terms.values(), *(p.grad for p in model.parameters())])
    for plain, compiled in zip(*found, strict=True):
        assert (plain is None) == (compiled is None)
        if plain is not None:
            torch.testing.assert_close(plain, compiled, rtol=1e-10, atol=1e-10)


class Recorder:
    """In place of a CUDA graph: what is done while it captures is only noted, and done by replay."""

    def __init__(self):
        self.notes, self.captures = [], False

    def __call__(self, action):
        if self.captures:
            self.notes.append(action)
        else:
            action()

    @contextlib.contextmanager
    def capturing(self, graph):
        assert graph is self and not self.notes
        self.captures = True
        yield
        self.captures = False

    def replay(self):
        for action in self.notes:
            action()


def test_captured_step_takes_every_batch_once(monkeypatch):
    """Three steps as they are, one captured, all further ones replayed, each with its own rows."""
    graph, no_stream = Recorder(), contextlib.nullcontext()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "CUDAGraph": lambda: graph,
        "graph": graph.capturing,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: no_stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    total, calls = torch.zeros(()), []

    def step(rows):
        calls.append(rows)
        out = torch.zeros(())
        graph(lambda: out.copy_(total.add_(rows.sum())))
        return out

    device, args = torch.device("cuda"), argparse.Namespace(compile="auto")
    fast = common.capture(step, args, device, world=1)
    batches = torch.arange(21).view(7, 3)
    seen = [fast(rows).item() for rows in batches]
    assert seen == batches.sum(1).cumsum(0).tolist()
    assert len(calls) == 4 and len(graph.notes) == 1
    for eager in ((args, device, 2), (argparse.Namespace(compile=False), device, 1)):
        assert common.capture(step, *eager) is step
    assert common.capture(step, args, torch.device("cpu"), 1) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("script", ["mvae", "mmvae", "mopoe", "svae", "vaevae"])
def test_captured_training_is_uncaptured_training(script, tmp_path, monkeypatch):
    """Without noise, epoch by epoch; with it the compiled code draws other numbers."""
    monkeypatch.setattr(torch, "randn_like", lambda t: torch.zeros_like(t))
    monkeypatch.setattr(
        torch.distributions.normal,
        "_standard_normal",
        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
    )
    options = ["--dataset", "tiny", "--device", "cuda", "--no-eval"]
    options += ["--expectation", "all"] if script == "mopoe" else []
    if script == "mmvae":
        options += ["--distribution", "normal", "--scales", "free", "--objective", "elbo"]
    objectives = []
    for mode in ("--no-compile", "--compile"):
        folder = tmp_path / mode
        tiny.add_to(script).main([*options, mode, "--runs-dir", str(folder)])
        rows = [*csv.DictReader(next(folder.glob("*/metrics.csv")).open())]
        objectives.append([float(row["objective"]) for row in rows])
    assert len(objectives[0]) == tiny.SETTINGS["epochs"]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-3)
