"""How long the evaluation of a PolyMNIST model takes, part by part, and where the time goes.

    python benchmarks/evaluation.py --json results/evaluation_cpu.json

MoPoE-VAE with the paper's networks and D = 512, all 31 subsets of 10,000 tuples of noise, 15
importance samples: the cost depends neither on what the images show nor on what the model has
learnt. Of each part: seconds, the share of them spent in encoders and in decoders, and the share of
the floor, which is the time of its networks' operations, by PyTorch's own counter, at the rate of
this machine's matrix product. The first part pays for the encoders, whose outputs are kept. The
classifiers, which are trained once and then cached, are not in it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from throughput import circumstances, matrix_rate, modalities, synchronize
from torch.utils.flop_counter import FlopCounterMode

import common
import datasets
import evaluate
import mopoe


def noise(tuples, known=500):
    """Data of noise, with labels of ten classes."""
    splits = []
    for seed, n in enumerate((known, tuples)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            m.name: torch.randint(256, (n, *m.shape), dtype=torch.uint8, generator=generator)
            for m in modalities()
        }
        splits.append((tensors, torch.arange(n) % 10))
    return datasets.from_tensors(*splits, modalities(), "noise")


class Stopwatch:
    """Adds up the seconds that modules take."""

    def __init__(self, modules, device):
        self.seconds, self.device = 0.0, device
        for module in modules:
            module.register_forward_pre_hook(self.start)
            module.register_forward_hook(self.stop)

    def start(self, *_):
        synchronize(self.device)
        self.began = time.perf_counter()

    def stop(self, *_):
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.began


def operations(model, parts, tuples):
    """The operations of each part's networks, part after part as in an evaluation."""
    counts = {}
    with evaluate.encoding_once(model, tuples):
        for name, part in parts.items():
            with FlopCounterMode(display=False) as counter:
                part(tuples)
            counts[name] = counter.get_total_flops()
    return counts


@common.command
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.error = common.fail
    add, modes = p.add_argument, ["float32", "bf16"]
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto prefers cuda")
    about = "test tuples, one for each of ten classes at least"
    add("--tuples", type=common.number(int, 10), default=10_000, help=about)
    add("--modes", nargs="+", choices=modes, default=modes, help="precisions (default: both)")
    add("--json", metavar="FILE", help="write the result there (default: nowhere)")
    options = p.parse_args(argv)
    device = common.parse_device(options.device)
    common.tune_cpu()
    torch.manual_seed(0)
    data = noise(options.tuples)
    train, test = data.train.to(device), data.test.to(device)
    model = mopoe.MoPoE(data.modalities, 512, beta=2.5).to(device).eval()
    named = {m.name: common.encoder(m, 10).to(device).eval() for m in data.modalities}
    named = {name: lambda x, name=name, net=net: net(x[name]) for name, net in named.items()}
    parts = {
        "latent accuracy": lambda test: evaluate.latent_accuracy(model, train, test),
        "coherence": lambda test: evaluate.conditional_coherence(model, named, test),
        "joint coherence": lambda test: evaluate.joint_coherence(model, named),
        "log-likelihood": lambda test: evaluate.log_likelihood(model, test),
    }
    watches = {kind: Stopwatch(getattr(model, kind), device) for kind in ("encoders", "decoders")}
    result = {**circumstances(device), "tuples": options.tuples, "modes": {}}
    chunk = evaluate.CHUNK
    few = [noise(tuples).test.to(device) for tuples in (chunk, 2 * chunk)]
    n = 8192 if device.type == "cuda" else 2048
    for mode in options.modes:
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        rows = result["modes"][mode] = {}
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=mode == "bf16"):
            one, two = (operations(model, parts, tuples) for tuples in few)
            with evaluate.encoding_once(model, test):
                for name, part in parts.items():
                    before = {kind: watch.seconds for kind, watch in watches.items()}
                    synchronize(device)
                    began = time.perf_counter()
                    part(test)
                    synchronize(device)
                    seconds = time.perf_counter() - began
                    row = rows[name] = {"seconds": round(seconds, 1)}
                    # Linear in the tuples, beside what is the same for any number of them.
                    total = one[name] + (two[name] - one[name]) * (options.tuples / chunk - 1)
                    floor = total / matrix_rate(dtype, device, n)
                    row["share_of_floor"] = round(floor / seconds, 3)
                    for kind, watch in watches.items():
                        share = (watch.seconds - before[kind]) / seconds
                        row[f"share_in_{kind}"] = round(share, 3)
                    shown = ", ".join(f"{key} {value}" for key, value in row.items())
                    print(f"{mode:8} {name:16} {shown}", flush=True)
        print(f"{mode:8} all {sum(row['seconds'] for row in rows.values()):.1f} seconds")
    if options.json:
        common.replace(options.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
