"""Run by torchrun from test_distributed.py: each process takes its rows of one joint batch.

    torchrun --nproc-per-node 2 distributed.py FOLDER SCRIPT...

Rank 0 writes to FOLDER/SCRIPT.pt the objective and the gradients that the processes find together,
and those of one process with the joint batch and the same noise.
"""

import importlib
import sys

import tiny
import torch
from torch import distributed, nn

BATCH = 12


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def main(script, file):
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
        whole = torch.randn(
            *shape[:-2], BATCH, shape[-1], generator=torch.Generator().manual_seed(1)
        )
        return whole[..., rows["now"], :]

    k = torch.arange(BATCH) % 3
    module.stratified = lambda weights: k[rows["now"]]
    torch.randn_like = lambda t: noise(t.shape)
    torch.distributions.normal._standard_normal = lambda shape, **_: noise(shape)
    torch.manual_seed(0)
    arguments = {"distribution": "normal"} if script == "mmvae" else {}
    model = method(tiny.MODALITIES, 3, **arguments)
    wrapped = nn.parallel.DistributedDataParallel(model)
    value, _ = wrapped({name: t[mine] for name, t in x.items()})
    (-value.mean()).backward()
    total = value.detach().mean()
    distributed.all_reduce(total)
    together = [total / world, *gradients(model)]

    if rank == 0:
        rows["now"] = slice(None)
        model.zero_grad()
        value, _ = model(x)
        (-value.mean()).backward()
        torch.save(
            {"together": together, "alone": [value.mean().detach(), *gradients(model)]}, file
        )


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    folder, *scripts = sys.argv[1:]
    for name in scripts:
        main(name, f"{folder}/{name}.pt")
    distributed.destroy_process_group()
