"""Run by torchrun from test_distributed.py, for each script:

    torchrun --nproc-per-node 2 distributed.py FOLDER SCRIPT...

a run of two epochs into FOLDER/runs and its resumption to three; then each process takes its rows
of one joint batch, and rank 0 writes to FOLDER/SCRIPT.pt the objective and the gradients that the
processes find together, and those of one process with the joint batch and the same noise.
"""

import importlib
import sys
from pathlib import Path

import tiny
import torch
from torch import distributed, nn

from common import Streams

BATCH = 12


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def one_batch(script, file):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    module = importlib.import_module(script)
    (method,) = [value for name, value in vars(module).items() if name.lower() == script]
    torch.set_default_dtype(torch.float64)
    x, _ = tiny.tuples(BATCH, 5)
    x = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    mine = slice(rank, None, world)

    # The noise of a row is the same wherever the row is computed; rows are the last but one axis.
    rows = {"now": mine}

    def noise(shape):
        *sizes, n, D = shape
        n = n if rows["now"] == slice(None) else n * world
        whole = torch.randn(*sizes, n, D, generator=torch.Generator().manual_seed(1))
        return whole[..., rows["now"], :]

    k = torch.arange(BATCH) % 3
    module.stratified = lambda weights: k[rows["now"]]
    torch.randn_like = lambda t: noise(t.shape)
    torch.distributions.normal._standard_normal = lambda shape, **_: noise(shape)
    torch.manual_seed(0)
    arguments = {"distribution": "normal"} if script == "mmvae" else {}
    model = method(tiny.MODALITIES, 3, **arguments)
    call = Streams(model) if script in ("svae", "vaevae") else model  # as they train
    wrapped = nn.parallel.DistributedDataParallel(call)
    value, _ = wrapped({name: t[mine] for name, t in x.items()})
    (-value.mean()).backward()
    total = value.detach().mean()
    distributed.all_reduce(total)
    together = [total / world, *gradients(model)]

    if rank == 0:
        rows["now"] = slice(None)
        model.zero_grad()
        value, _ = call(x)
        (-value.mean()).backward()
        torch.save(
            {"together": together, "alone": [value.mean().detach(), *gradients(model)]}, file
        )


if __name__ == "__main__":
    folder, *scripts = sys.argv[1:]
    distributed.init_process_group("gloo")
    # torchrun's store serves one group, so all runs share it instead of having each its own.
    end, ended = distributed.destroy_process_group, []
    distributed.init_process_group = lambda backend, **_: None
    distributed.destroy_process_group = lambda: ended.append(True)
    for name in scripts:
        options = ["--runs-dir", f"{folder}/runs", "--no-eval", "--epochs"]
        tiny.main(name, [*options, "2"])
        (path,) = Path(folder).glob(f"runs/tiny__{name}__*")
        tiny.main(name, ["--resume", str(path), *options, "3"])
    for name in scripts:
        one_batch(name, f"{folder}/{name}.pt")
    assert len(ended) == 2 * len(scripts)
    end()
