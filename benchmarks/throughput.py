"""Training throughput and peak memory, ours and a peer library's, same data, networks and batch.

    python benchmarks/throughput.py --json throughput.json

The contenders of a method, a process each, take whole steps (batch, forward, backward, Adam) in
turn, in windows of a few seconds, so that a machine's drift falls on all alike; the medians of the
windows are compared. Peak memory is the process's, which holds 20,000 tuples as its library holds
them, in uint8 here, in float32 at the peer's. Operations are counted by PyTorch's own counter; the
least bytes are those of the images and of what a step cannot but read and write of each parameter:
the weight in both directions, the gradient once written and once read, Adam's two moments and the
weight read and written. The floor is what operations or bytes, whichever take longer, would take at
the rates of this machine's matrix product and copy, measured between the windows. The peer is the
package `multivae`, where it is installed: its model of the same method and its data set in a bare
loop like ours, on a CPU set up as ours is (`common.tune_cpu`), both of which are kinder to it than
its own trainer; it has no SVAE and no VAEVAE. A tuple of svae.py and vaevae.py is a complete
one and each modality of another alone.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import re
import shlex
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
import mmvae
import mopoe
import mvae
import svae
import vaevae

SHAPE, MODALITIES, TUPLES = (3, 28, 28), 5, 20_000
# As the peer trains MMVAE: Laplace, learnt prior, DReG on the loose bound.
DREG = dict(objective="dreg", learn_prior=True)
STRATIFIED = dict(expectation="stratified")
METHODS = {
    "mopoe": mopoe.MoPoE,
    "mvae": mvae.MVAE,
    "mmvae": functools.partial(mmvae.MMVAE, **mmvae.COMPARED),  # as the script has it
    "mmvae-k1": functools.partial(mmvae.MMVAE, **DREG, K=1),
    "mmvae-k10": functools.partial(mmvae.MMVAE, **DREG, K=10),
    "svae": svae.SVAE,
    "vaevae": vaevae.VAEVAE,
    "vaevae-poe": functools.partial(vaevae.VAEVAE, joint="poe"),
    "svae-stratified": functools.partial(svae.SVAE, **STRATIFIED),
    "vaevae-poe-stratified": functools.partial(vaevae.VAEVAE, joint="poe", **STRATIFIED),
}
PEER, OF_PEER = "multivae-", ("mopoe", "mvae", "mmvae-k1", "mmvae-k10")
# A step of these takes a batch of each modality alone, too.
STREAMS = ("svae", "vaevae", "vaevae-poe", "svae-stratified", "vaevae-poe-stratified")
MODES = ("float32", "bf16", "float32 compiled", "bf16 compiled")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


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


def adam(model, capturable=False):
    weights = sorted(model.parameters(), key=torch.numel, reverse=True)
    return torch.optim.Adam(weights, lr=1e-3, fused=True, capturable=capturable)


def our_step(method, mode, options, device):
    """One update, as the script's loop makes it."""
    train = random_data().train.to(device)
    if method in STREAMS:
        train = datasets.with_streams(train, 1.0, 0)
    torch.manual_seed(0)
    model = METHODS[method](modalities(), options.latent_dim, beta=2.5).to(device)
    args = argparse.Namespace(compile="compiled" in mode)
    optimizer = adam(model, common.captures(args, device, 1))
    streamed = common.Streams(model) if train.streams else model
    fast_model = common.accelerate(streamed, args, device, 1)

    def update(rows):
        x, observed = train.batch(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            value, terms = fast_model(x, observed)
        loss = -value.sum() / options.batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([-loss.detach(), *terms.values()])

    return common.capture(update, common.captures(args, device, 1))


@functools.cache
def peer_data(device):
    from multivae.data.datasets.base import MultimodalBaseDataset

    tensors = random_data().train.tensors
    return MultimodalBaseDataset({n: t.to(device).float() / 255 for n, t in tensors.items()})


def peer_step(method, mode, options, device):
    """One update of multivae's model of a method with our networks."""
    from multivae import models
    from multivae.data.datasets.base import MultimodalBaseDataset
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
    Model, Config, settings = {
        "mopoe": (models.MoPoE, models.MoPoEConfig, {}),
        "mvae": (models.MVAE, models.MVAEConfig, {"warmup": 0}),
        "mmvae-k1": (models.MMVAE, models.MMVAEConfig, {"K": 1}),
        "mmvae-k10": (models.MMVAE, models.MMVAEConfig, {"K": 10}),
    }[method]
    config = Config(
        n_modalities=MODALITIES,
        latent_dim=options.latent_dim,
        input_dims=dict.fromkeys(names, SHAPE),
        decoders_dist=dict.fromkeys(names, "laplace"),
        decoder_dist_params={name: {"scale": 0.75} for name in names},
        beta=2.5,
        **settings,
    )
    torch.manual_seed(0)
    encoders = {m.name: Encoder(m) for m in modalities()}
    decoders = {m.name: Decoder(m) for m in modalities()}
    model = Model(config, encoders, decoders).to(device)
    model.device = device
    torch.backends.cudnn.benchmark = True  # as common.accelerate has it on a GPU
    optimizer, train = adam(model), peer_data(device)

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
    if name.startswith(PEER):
        update = peer_step(name.removeprefix(PEER), mode, options, device)
    else:
        update = our_step(name, mode, options, device)
    rows = options.batch_size * (1 + MODALITIES if name in STREAMS else 1)
    return lambda: update(torch.randint(TUPLES, (rows,), device=device))


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
    """Operations per second of an n×n matrix product, the best of several; on a GPU in TF32 for
    float32, as its convolutions are."""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return 2 * n**3 / min(seconds_of(lambda: a @ b, 3, device) for _ in range(5))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def processor():
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def circumstances(device):
    """What a result was measured by, and on what."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git": common.git_revision(__file__),
    }


def copy_rate(device, n=2**27):
    """Bytes per second that a copy of n bytes reads and writes, the best of several."""
    a, b = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * n / min(seconds_of(lambda: b.copy_(a), 3, device) for _ in range(5))


def least_bytes(method, options):
    """Bytes a tuple that a step of ours has to move, activations aside."""
    model = METHODS[method](modalities(), options.latent_dim)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = MODALITIES * math.prod(SHAPE) * (2 if method in STREAMS else 1)
    return images + 10 * 4 * parameters / options.batch_size


RUNNING = []  # the processes of the contenders


class Contender:
    """A contender in a process of its own, which waits for its windows."""

    def __init__(self, name, options):
        command = [sys.executable, __file__, "--contender", name, "--device", options.device]
        command += [
            "--batch-size",
            str(options.batch_size),
            "--latent-dim",
            str(options.latent_dim),
        ]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        RUNNING.append(self.process)

    def ask(self, repeat):
        """Begin `repeat` steps; of one that has ended, `answer` says so."""
        with contextlib.suppress(BrokenPipeError):
            print(repeat, file=self.process.stdin, flush=True)

    def answer(self):
        """Seconds a step, over the steps that were asked for."""
        if not (line := self.process.stdout.readline()):
            for process in RUNNING:  # before they complain of what they wait for
                process.kill()
            sys.exit(f"{' '.join(self.process.args[2:4])}: ended early, maybe for want of memory")
        return float(line)

    def seconds(self, repeat):
        """Seconds a step, over `repeat` steps."""
        self.ask(repeat)
        return self.answer()

    def end(self):
        """Ends the process; the peak of its memory in GB, the GPU's where there is one."""
        return float(self.process.communicate()[0])


def contend(options, device):
    """The contender's side: a line in is a number of steps, a line out their mean time."""
    common.tune_cpu()
    step = make_step(options.contender, options, device)
    for line in sys.stdin:
        print(seconds_of(step, int(line), device), flush=True)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        # Not getrusage, whose maximum a child process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)


def peer_is_there():
    try:
        import multivae.models  # noqa: F401
    except ImportError:
        print("multivae is not installed: no peer", file=sys.stderr)
        return False
    return True


def contenders_of(method, options):
    # DReG is not compiled before PyTorch 2.13 (mmvae.py).
    whole = method not in ("mmvae-k1", "mmvae-k10") or torch.__version__ >= (2, 13)
    found = [f"{method} {mode}" for mode in options.modes if whole or "compiled" not in mode]
    if method in OF_PEER and peer_is_there():
        # The hooks of its MMVAE fail under autocast.
        able = MODES[:1] if "mmvae" in method else MODES[:2]
        found += [f"{PEER}{method} {mode}" for mode in options.modes if mode in able]
    return found


def begin(methods, options, device):
    """{method: {name: contender}}, all of them begun side by side, so that they have compiled and
    captured before the first window."""
    begun = {m: {n: Contender(n, options) for n in contenders_of(m, options)} for m in methods}
    everyone = [contender for of_one in begun.values() for contender in of_one.values()]
    for contender in everyone:
        contender.ask(4 if device.type == "cuda" else 1)
    for contender in everyone:
        contender.answer()
    return begun


def measure(method, contenders, options, device):
    """A row of results for each contender of a method, its operations a tuple, and the machine's
    matrix products per second."""
    repeat = {
        name: max(1, round(options.seconds / contender.seconds(1)))
        for name, contender in contenders.items()
    }
    # A CPU without bfloat16 takes minutes for its matrix product: only where it is asked for.
    dtypes = {n: d for n, d in DTYPES.items() if any(mode.startswith(n) for mode in options.modes)}
    windows, rates = {name: [] for name in contenders}, {name: [] for name in (*dtypes, "copy")}
    n = 8192 if device.type == "cuda" else 2048
    for _ in range(options.windows):
        for name, contender in contenders.items():
            windows[name].append(options.batch_size / contender.seconds(repeat[name]))
        for name, dtype in dtypes.items():
            rates[name].append(matrix_rate(dtype, device, n))
        rates["copy"].append(copy_rate(device))
    rates = {name: statistics.median(seen) for name, seen in rates.items()}
    peaks = {name: contender.end() for name, contender in contenders.items()}
    few = argparse.Namespace(**vars(options) | {"batch_size": 100})  # the cost is linear in it
    with FlopCounterMode(display=False) as counter:
        make_step(f"{method} float32", few, device)()
    operations = counter.get_total_flops() / few.batch_size
    least = least_bytes(method, options)

    rows, peer = {}, f"{PEER}{method} float32"
    for name, rates_seen in windows.items():
        rate = statistics.median(rates_seen)
        product = rates["bf16" if "bf16" in name else "float32"]
        floor = min(product / operations, rates["copy"] / least)
        rows[name] = {
            "tuples_per_second": round(rate, 1),
            "slowest_window": round(min(rates_seen), 1),
            "fastest_window": round(max(rates_seen), 1),
            "share_of_floor": round(rate / floor, 3),
            "peak_memory_gb": round(peaks[name], 2),
        }
    for name, row in rows.items() if peer in rows else ():
        ratios = [a / b for a, b in zip(windows[name], windows[peer], strict=True)]
        row["times_the_peer"] = round(statistics.median(ratios), 2)
        row["times_the_peer_from_to"] = [round(f(ratios), 2) for f in (min, max)]
        share = row["peak_memory_gb"] / rows[peer]["peak_memory_gb"]
        row["memory_to_the_peer"] = round(share, 2)
    copied = rates.pop("copy")
    return {
        "operations_per_tuple": round(operations),
        "least_bytes_per_tuple": round(least),
        "copied_bytes_per_second": round(copied),
        "matrix_product_per_second": {name: round(rate) for name, rate in rates.items()},
        "contenders": rows,
    }


@common.command
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.error = common.fail
    add, positive = p.add_argument, common.number(int, 1)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto prefers cuda")
    add("--batch-size", type=positive, default=256, help="tuples a step")
    add("--latent-dim", type=positive, default=512, help="latent dimensions")
    about = "what competes (default: all)"
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help=about)
    about = "precisions, and whether compiled (default: all)"
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help=about)
    add("--windows", type=positive, default=9, help="windows of each contender")
    about = "about the length of a window"
    add("--seconds", type=common.number(float, 0.01), default=3.0, help=about)
    add("--json", metavar="FILE", help="write the result there (default: nowhere)")
    add("--contender", help=argparse.SUPPRESS)
    options = p.parse_args(argv)
    device = common.parse_device(options.device)
    if options.contender:
        return contend(options, device)

    result = {
        **circumstances(device),
        "batch_size": options.batch_size,
        "latent_dim": options.latent_dim,
        "methods": {},
    }
    # A CPU's memory may hold those of one method only.
    alike = [options.methods] if device.type == "cuda" else [[m] for m in options.methods]
    contenders = (pair for methods in alike for pair in begin(methods, options, device).items())
    for method, of_one in contenders:
        result["methods"][method] = found = measure(method, of_one, options, device)
        rates = found["matrix_product_per_second"].items()
        print(f"{method}: {found['operations_per_tuple'] / 1e6:,.0f} million operations a tuple,")
        print(f"  {found['least_bytes_per_tuple'] / 1e6:.2f} MB to move at least; the machine has")
        rates = [f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates]
        copied = f"copy {found['copied_bytes_per_second'] / 1e9:,.0f} GB/s"
        print("  matrix product", ", ".join([*rates, copied]))
        for name, row in found["contenders"].items():
            print(f"  {name:26}", ", ".join(f"{key} {value}" for key, value in row.items()))
        sys.stdout.flush()
        if options.json:
            common.replace(options.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
