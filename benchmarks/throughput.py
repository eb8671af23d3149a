"""Training throughput and peak memory, ours and a peer library's, same data, networks and batch.

    python benchmarks/throughput.py --json results/throughput_cpu.json

Every contender takes whole steps (batch, forward, backward, Adam) in turn, in windows of a few
seconds, so that a machine's drift falls on all alike; the medians of the windows are compared.
Peak memory is that of a process of its own, which
holds the data as its library holds them: 60,000 tuples in uint8 here, in float32 at the peer's. Operations are counted by PyTorch's own counter, the
floor is what they would take at the rate of this machine's matrix product, measured in the same
run. The peer is the package `multivae`, where it is installed: its model and its data set in a bare
loop like ours, which is kinder to it than its own trainer.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import datasets
import mopoe

SHAPE, MODALITIES, TUPLES = (3, 28, 28), 5, 60_000
METHODS = {"mopoe": mopoe.MoPoE}
MODES = ("float32", "bf16", "float32 compiled", "bf16 compiled")


def modalities():
    return [common.Modality(f"m{i}", SHAPE) for i in range(MODALITIES)]


@functools.cache
def random_data():
    """Tuples of noise: the cost of a step does not depend on what the images show."""
    generator = torch.Generator().manual_seed(0)
    shape = (TUPLES, *SHAPE)
    tensors = {
        m.name: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        for m in modalities()
    }
    part = tensors, torch.zeros(TUPLES)
    return datasets.from_tensors(part, part, modalities(), "noise")


def adam(model, device):
    return torch.optim.Adam(
        model.parameters(), lr=1e-3, fused=True, capturable=device.type == "cuda"
    )


def our_step(method, mode, options, device):
    """One update, as the script's loop makes it."""
    train = random_data().train.to(device)
    torch.manual_seed(0)
    model = METHODS[method](modalities(), options.latent_dim, beta=2.5).to(device)
    args = argparse.Namespace(compile="compiled" in mode)
    fast_model, optimizer = common.accelerate(model, args, device, 1), adam(model, device)

    def update(rows):
        x, observed = train.batch(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            value, terms = fast_model(x, observed)
        loss = -value.sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([value.detach().mean(), *terms.values()])

    return common.capture(update, args, device, 1)


def peer_step(mode, options, device):
    """One update of multivae's MoPoE with our networks."""
    from multivae.data.datasets.base import MultimodalBaseDataset
    from multivae.models import MoPoE, MoPoEConfig
    from multivae.models.nn.base_architectures import BaseDecoder, BaseEncoder
    from pythae.models.base.base_utils import ModelOutput

    class Encoder(BaseEncoder):
        def __init__(self, modality):
            super().__init__()
            self.latent_dim = options.latent_dim
            self.net = common.encoder(modality, 2 * options.latent_dim)

        def forward(self, x):
            mu, logvar = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self, modality):
            super().__init__()
            self.latent_dim = options.latent_dim
            self.net = common.decoder(modality, options.latent_dim)

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z))

    names = [m.name for m in modalities()]
    config = MoPoEConfig(
        n_modalities=MODALITIES,
        latent_dim=options.latent_dim,
        input_dims=dict.fromkeys(names, SHAPE),
        decoders_dist=dict.fromkeys(names, "laplace"),
        decoder_dist_params={name: {"scale": 0.75} for name in names},
        beta=2.5,
    )
    torch.manual_seed(0)
    encoders = {m.name: Encoder(m) for m in modalities()}
    decoders = {m.name: Decoder(m) for m in modalities()}
    model = MoPoE(config, encoders, decoders).to(device)
    model.device = device
    optimizer = adam(model, device)
    floats = {name: t.to(device).float() / 255 for name, t in random_data().train.tensors.items()}
    train = MultimodalBaseDataset(floats)

    def update(rows):
        inputs = MultimodalBaseDataset(train[rows].data)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            loss = model(inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def make_step(contender, options, device):
    name, mode = contender.split(" ", 1)
    if name == "multivae":
        update = peer_step(mode, options, device)
    else:
        update = our_step(name, mode, options, device)
    return lambda: update(torch.randint(TUPLES, (options.batch_size,), device=device))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call, repeat, device):
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / repeat


def matrix_rate(dtype, device, n):
    """Operations per second of one n×n matrix product, the best of several."""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, 3, device) for _ in range(5))


def peak_memory(contender, options):
    """GB at the highest, of a process that takes a few steps; the GPU's where there is one."""
    command = [sys.executable, __file__, "--peak", contender, "--device", options.device]
    command += ["--batch-size", str(options.batch_size), "--latent-dim", str(options.latent_dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(options, device):
    step = make_step(options.peak, options, device)
    for _ in range(6):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        # Not getrusage, whose maximum a child process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)


def contenders_of(options):
    found = [f"{method} {mode}" for method in METHODS for mode in options.modes]
    try:
        import multivae.models  # noqa: F401
    except ImportError:
        print("multivae is not installed: no peer", file=sys.stderr)
        return found
    return [*found, *(f"multivae {mode}" for mode in options.modes if "compiled" not in mode)]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--latent-dim", type=int, default=512)
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--windows", type=int, default=9, help="windows of each contender")
    p.add_argument("--seconds", type=float, default=3.0, help="about the length of a window")
    p.add_argument("--json", metavar="FILE", help="write the result there")
    p.add_argument("--peak", metavar="CONTENDER", help=argparse.SUPPRESS)
    options = p.parse_args()
    device = common.parse_device(options.device)
    if options.peak:
        return print_peak(options, device)

    contenders = contenders_of(options)
    steps = {name: make_step(name, options, device) for name in contenders}
    with FlopCounterMode(display=False) as counter:
        make_step("mopoe float32", options, device)()
    operations = counter.get_total_flops() / options.batch_size
    repeat = {}
    for name, step in steps.items():
        seconds_of(step, 5, device)
        repeat[name] = max(1, round(options.seconds / seconds_of(step, 3, device)))
    windows = {name: [] for name in contenders}
    for _ in range(options.windows):
        for name, step in steps.items():
            windows[name].append(options.batch_size / seconds_of(step, repeat[name], device))
    n = 8192 if device.type == "cuda" else 2048
    rates = {
        "float32": matrix_rate(torch.float32, device, n),
        "bf16": matrix_rate(torch.bfloat16, device, n),
    }
    del steps

    peer = "multivae float32"
    rows = {}
    for name in contenders:
        rate = statistics.median(windows[name])
        floor = rates["bf16" if "bf16" in name else "float32"] / operations
        rows[name] = {
            "tuples_per_second": round(rate, 1),
            "slowest_window": round(min(windows[name]), 1),
            "fastest_window": round(max(windows[name]), 1),
            "share_of_floor": round(rate / floor, 3),
            "peak_memory_gb": round(peak_memory(name, options), 2),
        }
    for name, row in rows.items():
        if peer in rows:
            ratios = [a / b for a, b in zip(windows[name], windows[peer], strict=True)]
            row["times_the_peer"] = round(statistics.median(ratios), 2)
            row["memory_to_the_peer"] = round(
                row["peak_memory_gb"] / rows[peer]["peak_memory_gb"], 2
            )
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git": common.git_revision(),
        "batch_size": options.batch_size,
        "latent_dim": options.latent_dim,
        "operations_per_tuple": round(operations),
        "matrix_product_per_second": {name: round(rate) for name, rate in rates.items()},
        "contenders": rows,
    }
    print(f"{operations / 1e6:.0f} million operations a tuple; matrix product ", end="")
    print(", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()))
    for name, row in rows.items():
        print(f"{name:26}", ", ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        common.replace(options.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
