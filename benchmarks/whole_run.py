"""How long a run takes from the command to the table, part by part.

    python benchmarks/whole_run.py mopoe --dataset polymnist --beta 2.5 --amp --json FILE

runs mopoe.py with the options behind it, and then writes FILE. "first steps" compile, and on a GPU
capture; "classifiers" are trained here once and then cached, so an empty --cache-dir makes it a
first run. "the rest" is what no part has: checkpoints, logs, the table.
"""

import time

BEGAN = time.monotonic()

import argparse
import functools
import importlib
import json
import shlex
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch

import common
import datasets
import evaluate

SECONDS = {}  # by part
PARTS = {
    "data": (datasets, "load"),
    "classifiers": (evaluate, "classifiers"),
    "latent accuracy": (evaluate, "latent_accuracy"),
    "coherence": (evaluate, "conditional_coherence"),
    "joint coherence": (evaluate, "joint_coherence"),
    "log-likelihood": (evaluate, "log_likelihood"),
    "pictures": (evaluate, "draw_samples"),
    "picture of latents": (evaluate, "draw_latents"),
}
FIRST = 4  # steps: three as they are, one that is captured


def timed(part, function):
    """The function, whose seconds, the GPU's work included, are added to the part's."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            SECONDS[part] = SECONDS.get(part, 0.0) + time.monotonic() - began

    return call


@common.command
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.error = common.fail
    scripts = ["mvae", "mmvae", "mopoe", "svae", "vaevae"]
    p.add_argument("script", choices=scripts, help="whose run; what else stands here is its own")
    about = "write the result there (default: nowhere)"
    p.add_argument("--json", metavar="FILE", help=about)
    options, theirs = p.parse_known_args(argv)
    if any(text.split("=")[0] == "--resume" for text in theirs):
        raise common.UserError("--resume: a whole run is measured, from its first epoch on")
    command = shlex.join(["python", *sys.argv])
    script = importlib.import_module(options.script)
    SECONDS["imports"] = time.monotonic() - BEGAN
    for part, (module, name) in PARTS.items():
        setattr(module, name, timed(part, getattr(module, name)))
    setup, capture, epoch_row = common.setup, common.capture, common.epoch_row
    found, rates = [], []

    def placing(args):
        found.extend(setup(args))
        return found

    def capturing(*args):
        step = capture(*args)
        first, left = timed("first steps", step), iter(range(FIRST))
        return lambda rows: (step if next(left, None) is None else first)(rows)

    def noting(epoch, names, log, began, tuples):
        row = epoch_row(epoch, names, log, began, tuples)
        rates.append(row["tuples_per_second"])
        SECONDS["epochs"] = SECONDS.get("epochs", 0.0) + tuples / row["tuples_per_second"]
        return row

    common.setup, common.capture, common.epoch_row = placing, capturing, noting
    script.main(theirs)

    total = time.monotonic() - BEGAN
    SECONDS["epochs"] -= SECONDS["first steps"]
    SECONDS["the rest"] = total - sum(SECONDS.values())
    from throughput import circumstances  # loads all five scripts

    result = circumstances(found[0]) | {
        "command": command,
        "epochs": len(rates),
        "tuples_per_second": round(statistics.median(rates)),
        "seconds": {part: round(seconds, 1) for part, seconds in SECONDS.items()},
        "seconds_in_all": round(total, 1),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        common.replace(options.json, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
