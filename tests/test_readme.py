"""README's worked example and commands do what README says."""

import csv
import importlib
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate

README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())  # however its lines are broken
RESULTS = (ROOT / "results" / "README.md").read_text()
SCRIPTS = ("mvae", "mmvae", "mopoe", "svae", "vaevae")

TRAINED, FILE, FORK, TEST = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def python(folder, *arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_fork_of_readme_trains_and_evaluates(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    script = (ROOT / "mopoe.py").read_text()
    head, tail = script.split("\n\n\ndef arguments", 1)
    (tmp_path / "mymopoe.py").write_text(f"{head}\n\n{FORK}\n\ndef arguments{tail}")

    assert "--dataset halves" in README
    out = python(tmp_path, "mymopoe.py", "--dataset", "halves")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("halves__mymopoe__0__") and "joint coherence" in out
    results = (run / "results.json").read_text()
    assert json.loads(results)["latent_accuracy/left+right"] > 0.7
    assert python(tmp_path, "evaluate.py", f"runs/{run.name}") == out.split("run:")[0]
    assert (run / "results.json").read_text() == results
    trained = TRAINED.replace("runs/RUN", f"runs/{run.name}").replace('"m1"', '"left"')
    assert python(tmp_path, "-c", trained + "print(x['right'].shape)").endswith(
        "torch.Size([8, 1, 8, 4])\n"
    )

    for file in ("exact.py", "conftest.py"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests")
    (tmp_path / "tests" / "test_mymopoe.py").write_text(TEST)
    assert "1 passed" in python(tmp_path, "-m", "pytest", "-q", "tests/test_mymopoe.py")
    fork = (tmp_path / "mymopoe.py").read_text()
    (tmp_path / "mymopoe.py").write_text(fork.replace("kl = (weights", "kl = (2 * weights"))
    failing = [sys.executable, "-m", "pytest", "-q", "tests/test_mymopoe.py"]
    assert subprocess.run(failing, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_file_of_readme_trains(tmp_path):
    python(tmp_path, "-c", FILE)
    (command,) = re.findall(r"^python (mopoe.py --dataset digits.npz .*)$", README, re.MULTILINE)
    script, *options = command.split()
    python(tmp_path, str(ROOT / script), *options, "--epochs", "1", "--no-eval")
    (run,) = (tmp_path / "runs").iterdir()
    *_, last = (run / "metrics.csv").read_text().splitlines()
    assert run.name.startswith("digits__mopoe__0__") and last.startswith("1,")


def test_every_test_that_readme_names_exists():
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_ci_runs_the_test_command_of_readme():
    (command,) = re.findall(r"## Tests\n\n```sh\n(.*)\n```", README)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command


@pytest.mark.parametrize("folder", [ROOT, ROOT / "results"], ids=["README", "results/README"])
def test_what_readme_links_to_exists(folder):
    text = (folder / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = folder / path if path else folder / "README.md"
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, link


# ------------------------------------------------------------------------ the numbers of results


def measured(pattern):
    """evaluate.statistics of the committed results, {metric: {label: {column: (mean, …)}}}."""
    files = sorted((ROOT / "results").glob(pattern))
    return evaluate.statistics([evaluate.read_results(file) for file in files])


def assert_row(label, cells):
    assert f"| {label} | {' | '.join(cells)} |" in RESULTS


JOINT, CROSS = ("joint coherence, %", "joint"), "coherence from a subset to a target, %"
PAIRS = [JOINT, (CROSS, "mnist → svhn"), (CROSS, "svhn → mnist")]
INPUTS = [("coherence of the modalities not given, %", n) for n in "1234"]
LATENTS = ("latent accuracy, %", "mnist+svhn+text")
HALVES = [
    ("class of the whole image, by the oracle, %", S) for S in ("top+bottom", "top", "bottom")
]
LOG_P_GIVEN = "log p(x) of one given the others, nats"
MIXED_LOG_P = [(evaluate.MIXED, "mnist+svhn+text"), (evaluate.MIXED, "mnist")]
LOG_P = [("log p(x) of one, nats", "image+label → image"), ("log p(X), nats", "image+label")]
OF_FACES = [(metric, column.replace("label", "attributes")) for metric, column in LOG_P]
LABEL = ("labels and texts generated as they are, %", "image → label")
DIGITS = ("their symbols, %", "image → text")
STRING = (LABEL[0], "image → text")
COUNTS = [(CROSS, "image → text"), (CROSS, "text → image")]
MEAN_AP = "mean average precision of the latents, %"
CROSS_AP = "mean average precision from a subset to a target, %"
OF_TEXTS = [(CROSS_AP, "image → text"), (CROSS_AP, "text → image")]
COMPARED, SPLIT = ["mvae.py", "mmvae.py", "mopoe.py"], ["svae.py", "vaevae.py", "mmvae.py"]


def test_the_numbers_beside_the_papers_are_those_of_results():
    papers = json.loads(evaluate.PAPERS.read_text())
    rows = [("polymnist-300__*", "mopoe.py", columns, 0) for columns in (INPUTS, [JOINT])]
    rows += [("polymnist__*", "mopoe.py", INPUTS, 0)]
    rows += [("polymnist__*", label, [JOINT], 0) for label in COMPARED]
    rows += [("mnist-svhn-text__*", label, [LATENTS], 0) for label in COMPARED]
    rows += [("mnist-svhn-text__*", label, [JOINT], 0) for label in COMPARED]
    rows += [("mnist-svhn-text-40__*", "mopoe.py", [LATENTS, JOINT], 0)]
    rows += [("mnist-svhn-text__*", label, MIXED_LOG_P, 0) for label in COMPARED]
    rows += [("mnist-split__*", f"{label} --supervision 1.0", HALVES, 0) for label in SPLIT]
    rows += [("mnist-svhn__*", "mmvae.py --K 10 --objective dreg", PAIRS, 0)]
    rows += [("mnist-svhn__*", "mmvae.py --K 10 --objective dreg-tight", PAIRS, 1)]
    rows += [("binary-mnist-label-340__*", "mvae.py", LOG_P, 0)]
    rows += [("mnist-label__*", "mvae.py", LOG_P, 0)]
    rows += [("fashion-label-weight__*", "mvae.py --supervision 1.0", [LABEL], -1)]
    for share, which in ((1.0, -1), (0.01, 3)):
        rows += [("multimnist__*", f"mvae.py --supervision {share}", [DIGITS], which)]
    rows += [("celeba-attr__*", "mvae.py", OF_FACES, 0)]
    rows += [("celeba-text__*", label, OF_TEXTS, 0) for label in COMPARED]
    (table,) = re.findall(r"^\| data, paper .*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    for line, (pattern, label, columns, which) in zip(table.splitlines(), rows, strict=True):
        *_, method, paper, here = line.strip("| ").split(" | ")
        found = measured(f"{pattern}.json")
        of_paper = papers[re.sub("(-300|-340|-40|-weight)?__.*", "", pattern)]
        script = label.partition(".py")[0]
        assert method.split(",")[0].lower() == script
        printed = [of_paper[script][metric][which]["columns"][name] for metric, name in columns]
        in_table = [float(number) for number in re.findall(r"[-\d.]+", paper)]
        assert in_table == pytest.approx([n for value in printed for n in value], abs=0.05)
        ours = (evaluate.plus_minus(*found[metric][label][name]) for metric, name in columns)
        assert here == ", ".join(ours)


@pytest.mark.parametrize("dataset", ["polydigits", "polymnist"])
def test_tables_by_the_number_of_inputs_are_those_of_results(dataset):
    found = measured(f"{dataset}__*.json")
    for metric, title in (
        ("coherence of the modalities not given, %", "coherence of the modalities not given, %"),
        ("coherence of all modalities, %", "coherence of all five, %"),
        ("latent accuracy, %", "latent accuracy, %"),
        ("log p(X), nats", "log p(X), nats"),
    ):
        assert f"**{title}**" in RESULTS
        for label, columns in found[metric].items():
            cells = [evaluate.plus_minus(*columns.get(n, [None])) for n in "12345"]
            assert_row(f"`{label}`", cells)


def test_the_table_at_equal_cost_is_that_of_results():
    for script in SCRIPTS:
        # Of two methods the runs of the table above cost as much.
        name = "polydigits" if script in ("mmvae", "vaevae") else "polydigits-cost"
        results = evaluate.read_results(ROOT / "results" / f"{name}__{script}__0.json")
        coherence = [results[f"coherence_by_inputs/{n}/without_inputs"] for n in (1, 2, 3, 4)]
        joint, log_p = results["joint_coherence"], results["log_likelihood/m0+m1+m2+m3+m4"]
        cells = [str(results["epochs"]), ", ".join(f"{100 * share:.1f}" for share in coherence)]
        assert_row(f"`{script}.py`", [*cells, f"{100 * joint:.1f}", f"{log_p:.1f}"])


def test_the_first_table_is_that_of_results():
    found = measured("polydigits__*.json")
    speed = json.loads((ROOT / "results" / "throughput_epyc.json").read_text())["methods"]
    for script in SCRIPTS:
        (row,) = re.findall(rf"^\| \[`{script}.py`\].*$", README, re.MULTILINE)
        coherence = found["coherence of the modalities not given, %"][f"{script}.py"]
        joint, deviation = found["joint coherence, %"][f"{script}.py"]["joint"]
        key = "mmvae-k1" if script == "mmvae" else script
        rate = speed[key]["contenders"][f"{key} float32"]["tuples_per_second"]
        expected = [
            ", ".join(f"{coherence[n][0]:.0f}" for n in "1234"),
            f"{joint:.0f} ± {deviation:.0f}",
            evaluate.plus_minus(*found["log p(X), nats"][f"{script}.py"]["5"]),
            f"{rate:.0f}",
        ]
        assert row.split(" | ")[3:] == [*expected[:3], expected[3] + " |"]


def test_the_table_of_mnist_split_is_that_of_results():
    metric = "class of the whole image, by the oracle, %"
    found = measured("mnist-split__*.json")[metric]
    for script in SCRIPTS:
        cells = []
        for share in ("1.0", "0.1", "0.01", "0.001"):
            columns = found[f"{script}.py --supervision {share}"]
            means = (columns[subset][0] for subset in ("top+bottom", "top", "bottom"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        assert f"| `{script}.py` | {' | '.join(cells)} | " in RESULTS


def test_the_table_of_mnist_split_3_is_that_of_results():
    found = measured("mnist-split-3__*.json")["class of the whole image, by the oracle, %"]
    for label, columns in found.items():
        assert_row(f"`{label}`", [f"{mean:.1f}" for mean, _ in columns.values()])


@pytest.mark.parametrize("name, epochs", [("", ""), ("-40", ", 40 epochs")])
def test_the_tables_of_mnist_svhn_text_are_those_of_results(name, epochs):
    found = measured(f"mnist-svhn-text{name}__*.json")
    coherence = found["coherence from a subset to a target, %"]
    for label, latents in found["latent accuracy, %"].items():
        assert_row(f"`{label}`{epochs}", [evaluate.plus_minus(*v) for v in latents.values()])
        values = *coherence[label].values(), found["joint coherence, %"][label]["joint"]
        assert_row(f"`{label}`{epochs}", [evaluate.plus_minus(*value) for value in values])


def test_the_log_likelihoods_of_mnist_svhn_text_are_those_of_results_and_of_the_paper():
    papers = json.loads(evaluate.PAPERS.read_text())["mnist-svhn-text"]
    methods = measured("mnist-svhn-text__*.json")
    longer, twelve = (measured(f"mnist-svhn-text-{name}__*.json") for name in ("40", "12"))
    objectives = measured("mnist-svhn-text-objective__*.json")
    of_paper = {f"{script}.py": metrics[evaluate.MIXED][0] for script, metrics in papers.items()}
    *_, definition_1, eq_5 = papers["mopoe"][evaluate.MIXED]
    of_paper["mopoe.py --expectation stratified --kl components"] = definition_1
    of_paper["mopoe.py --expectation all --kl components"] = eq_5
    log_p, mixed = "log p(X), nats", evaluate.MIXED
    for found in (methods, objectives):
        for label, columns in found[log_p].items():
            name = f"`{re.sub('mopoe.py (?=--)', '', label)}`"
            rows = [
                (title, runs[metric][label])
                for title, runs, metric in (
                    (name, found, log_p),
                    ("the same, mixed", found, mixed),
                    (f"{name}, 40 epochs", longer, log_p),
                    ("the same, mixed", longer, mixed),
                    ("the same, mixed of 12 samples", twelve, mixed),
                )
                if label in runs[metric]
            ]
            if label in of_paper:
                rows.append(("paper", of_paper[label]["columns"]))
            cells = ((name, *(evaluate.plus_minus(*row[S]) for S in columns)) for name, row in rows)
            assert "\n".join(f"| {' | '.join(row)} |" for row in cells) in RESULTS


def test_the_table_of_mnist_svhn_is_that_of_results():
    found = measured("mnist-svhn__*.json")
    for label, latents in found["latent accuracy, %"].items():
        joint = found["joint coherence, %"][label]["joint"]
        cross = found["coherence from a subset to a target, %"][label].values()
        log_p = found["log p(X), nats"][label]["mnist+svhn"]
        cells = [evaluate.plus_minus(*value) for value in (joint, *cross, *latents.values(), log_p)]
        (objective,) = re.findall(r"--objective (\S+)", label)
        assert_row(f"`{objective}`", cells)


def test_the_table_of_mnist_svhn_by_shares_is_that_of_results():
    found = measured("mnist-svhn-shares__*.json")
    for script in SCRIPTS:
        cells = []
        for share in ("1.0", "0.1", "0.01", "0.001"):
            label = f"{script}.py --supervision {share}"
            means = (found[metric][label][column][0] for metric, column in PAIRS)
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        assert_row(f"`{script}.py`", cells)


def test_the_table_of_longer_training_on_mnist_svhn_is_that_of_results():
    for name, epochs in (("shares__{}__0__1", 6), ("30__{}__0", 30)):
        for script in SCRIPTS:
            found = measured(f"mnist-svhn-{name.format(script)}.json")
            found = {metric: rows[f"{script}.py"] for metric, rows in found.items()}
            values = [found[metric][column] for metric, column in PAIRS]
            values += found["latent accuracy, %"].values()
            values.append(found["log p(X), nats"]["mnist+svhn"])
            cells = [evaluate.plus_minus(*value) for value in values]
            assert_row(f"`{script}.py`, {epochs} epochs", cells)


@pytest.mark.parametrize(
    "pattern, row",
    [
        ("__*__0", "0"),
        ("__*__8", "8"),
        *((f"-weight-{weight}__*__8", f"{weight}") for weight in (1, 2, 3, 10)),
        ("__*__8", "50, the table above"),
        ("-weight-3-100__*", "3, 100 epochs, N = 60, one seed"),
    ],
)
def test_the_tables_of_mnist_with_labels_are_those_of_results(pattern, row):
    titles = "image → label, %", "label → image, %", "joint coherence, %", "log p(X)"
    assert_row("N", titles)
    assert_row("λ, N = 8", titles)
    found = measured(f"binary-mnist-label{pattern}.json")
    (columns,) = found["coherence from a subset to a target, %"].values()
    (joint,) = found["joint coherence, %"].values()
    (log_p,) = found["log p(X), nats"].values()
    values = (*columns.values(), joint["joint"], log_p["image+label"])
    assert_row(row, [evaluate.plus_minus(*value) for value in values])


def test_the_table_of_few_labels_is_that_of_results_and_of_the_paper():
    weights = "", "-weight", "-weight-2"
    found = [measured(f"fashion-label{name}__*.json") for name in weights]
    columns = []
    papers = json.loads(evaluate.PAPERS.read_text())["fashion-label"]["mvae"]
    metric = "labels and texts generated as they are, %"
    for share in (1.0, 0.1, 0.01):
        label = f"mvae.py --supervision {share}"
        (paper,) = [p for p in papers[metric] if p["options"]["supervision"] == [share]]
        columns.append([])
        for of_one in found:
            of = {metric: rows.get(label) for metric, rows in of_one.items()}
            columns[-1] += [
                of[metric]["image → label"][0],
                of["latent accuracy, %"]["image"][0],
                of["log p(X), nats"]["image+label"][0],
            ]
        columns[-1] += paper["columns"]["image → label"]
    titles = ["image → label, %", "image's latents, %", "log p(X)"]
    titles += [f"λ = {weight}, {title}" for weight in (1, 2) for title in titles]
    titles.append("paper, image → label, %")
    for title, *values in zip(titles, *columns, strict=True):
        assert_row(title, [f"{value:.1f}" for value in values])


def test_the_table_of_multimnist_by_shares_is_that_of_results_and_of_the_paper():
    found, columns = measured("multimnist__*.json"), []
    papers = json.loads(evaluate.PAPERS.read_text())["multimnist"]["mvae"][DIGITS[0]]
    for share in (1.0, 0.1, 0.01):
        label = f"mvae.py --supervision {share}"
        (paper,) = [p for p in papers if p["options"]["supervision"] == [share]]
        shown = (DIGITS, STRING, *COUNTS, JOINT, ("log p(X), nats", "image+text"))
        columns.append([found[metric][label][column][0] for metric, column in shown])
        columns[-1].append(paper["columns"]["image → text"][0])
    titles = ["image → digits, %", "image → whole string, %", "number of digits, image → text, %"]
    titles += ["number of digits, text → image, %", "number of digits, joint, %", "log p(X)"]
    for title, *values in zip([*titles, "paper, image → digits, %"], *columns, strict=True):
        assert_row(title, [f"{value:.1f}" for value in values])


def test_the_tables_of_celeba_are_those_of_results():
    both = "image+attributes"
    for name, label, weight in (
        ("celeba-attr__mvae__0", "`mvae.py`", "10"),
        ("celeba-attr-weight__mvae__0", "`mvae.py --weights attributes=1`", "1"),
        ("celeba-attr-weight-2__mvae__0", "`mvae.py --weights attributes=2`", "2"),
    ):
        results = evaluate.read_results(ROOT / "results" / f"{name}.json")
        keys = f"marginal/{both}/image", f"log_likelihood/{both}", f"conditional/{both}/image"
        assert_row(label, [f"{results[key]:.1f}" for key in keys])
        keys = ["symbol_accuracy/image/attributes", "precision/image/attributes"]
        keys += ["precision/attributes/image", "precision/attributes/attributes"]
        keys += ["latent_precision/image", "latent_precision/attributes"]
        row = weight if weight == "10" else f"{weight} ([file]({name}.json))"
        assert_row(row, [f"{100 * results[key]:.1f}" for key in keys])


def test_the_table_of_faces_and_texts_is_that_of_results_and_of_the_paper():
    found, papers = (
        measured("celeba-text__*.json"),
        json.loads(evaluate.PAPERS.read_text())["celeba-text"],
    )
    columns = [*((MEAN_AP, S) for S in ("image", "text", "image+text")), *OF_TEXTS]
    for script, metrics in papers.items():
        values = (found[metric][f"{script}.py"][column] for metric, column in columns)
        ours = [evaluate.plus_minus(*value) for value in values]
        theirs = [str(metrics[metric][0]["columns"][column][0]) for metric, column in columns]
        assert (
            f"| `{script}.py` | {' | '.join(ours)} |\n| paper | {' | '.join(theirs)} |" in RESULTS
        )


def test_the_table_of_nineteen_modalities_is_that_of_results():
    results = evaluate.read_results(ROOT / "results" / "celeba19__mvae__0.json")
    names = max((k for k in results if k.startswith("log_likelihood/")), key=len).partition("/")[2]
    keys = f"marginal/{names}/image", f"log_likelihood/{names}", f"conditional/{names}/image"
    variances = ", ".join(f"{results[f'log_weight_variance/{key}']:.1f}" for key in keys)
    assert_row("`mvae.py`, celeba19", [*(f"{results[key]:.1f}" for key in keys), variances])
    right = [v for k, v in results.items() if k.startswith("exact_match/image/")]
    assert len(right) == 18 and f"{100 * sum(right) / 18:.1f} % are right in the mean" in RESULTS


def test_the_table_of_batches_on_polymnist_is_that_of_results():
    for label, name in (
        ("1,024, 20, 1,160 ([file](polymnist-batch__mopoe__0.json))", "polymnist-batch"),
        ("1,024, 50, 2,900 ([file](polymnist-batch-50__mopoe__0.json))", "polymnist-batch-50"),
        ("1,024, 80, 4,640 ([file](polymnist-batch-80__mopoe__0.json))", "polymnist-batch-80"),
        ("256, 20, 4,680", "polymnist"),
    ):
        results = evaluate.read_results(ROOT / "results" / f"{name}__mopoe__0.json")
        epochs, steps = (int(n.split()[0].replace(",", "")) for n in label.split(", ")[1:])
        batch = results["options"]["batch_size"]
        assert (results["epochs"], epochs * (60_000 // batch)) == (epochs, steps)
        found = evaluate.numbers(results)
        coherence = ", ".join(f"{found[metric][n]:.1f}" for metric, n in INPUTS)
        rest = (
            found[JOINT[0]][JOINT[1]],
            *(found[m]["5"] for m in ("latent accuracy, %", LOG_P[1][0])),
        )
        assert_row(label, [coherence, *(f"{value:.1f}" for value in rest)])


@pytest.mark.parametrize(
    "file, dataset, grey",
    [
        ("binary-mnist-label-340", "binary-mnist-label", ""),
        ("mnist-label", "mnist-label", ", grey"),
    ],
)
def test_the_likelihoods_of_mnist_with_labels_are_those_of_results_and_of_the_paper(
    file, dataset, grey
):
    results = evaluate.read_results(ROOT / "results" / f"{file}__mvae__0.json")
    found = evaluate.statistics([results])
    papers = json.loads(evaluate.PAPERS.read_text())[dataset]["mvae"]
    lines, variances = [f"| | by samples of | here{grey} | paper, by samples of q(z\\|x1,x2) |"], []
    lines.append("|---|---|---|---|")
    for title, metric, column, more in (
        ("log p(x1)", "log p(x) of one, nats", "{} → image", ""),
        ("log p(X)", "log p(X), nats", "{}", ""),
        ("log p(x1\\|x2)", LOG_P_GIVEN, "{} → image", ", and q(z\\|x2) for log p(x2)"),
    ):
        by_image, by_both = (
            found[metric]["mvae.py"][column.format(S)][0] for S in ("image", "image+label")
        )
        (paper,) = papers[metric][0]["columns"].values()
        lines.append(f"| {title} | q(z\\|x1){more} | {by_image:.1f} | |")
        lines.append(f"| | q(z\\|x1,x2){more} | {by_both:.1f} | {paper[0]:.1f} |")
    assert "\n".join(lines) + "\n\n" in RESULTS
    for metric, column in (
        ("variance of log w, log p(x) of one", "image+label → image"),
        ("variance of log w, log p(X)", "image+label"),
        ("variance of log w, one given the others", "image+label → image"),
    ):
        paper = papers[metric][0]["columns"][column][0]
        variances.append((found[metric]["mvae.py"][column][0], paper))
    ours, theirs = zip(*variances, strict=True)
    assert_row(f"`mvae.py`{grey}", [f"{value:.1f}" for value in ours])
    assert_row(f"paper{grey}", [f"{value:.1f}" for value in theirs])


def test_the_table_of_speed_is_that_of_results():
    kinds = "epyc", "k10_epyc", "k10_bf16_epyc"
    files = (ROOT / "results" / f"throughput_{kind}.json" for kind in kinds)
    speed, full, half = (json.loads(file.read_text())["methods"] for file in files)
    full["mmvae-k10"]["contenders"] |= half["mmvae-k10"]["contenders"]
    names = {
        "mmvae-k1": "`mmvae.py`, K = 1",
        "mmvae-k10": "`mmvae.py`, K = 10",
        "svae-stratified": "`svae.py --expectation stratified`",
        "vaevae-poe": "`vaevae.py --joint poe`",
        "vaevae-poe-stratified": "`vaevae.py --joint poe --expectation stratified`",
    }
    for key, method in (speed | full).items():
        ours, half = (method["contenders"][f"{key} {mode}"] for mode in ("float32", "bf16"))
        name = names.get(key, f"`{key}.py`")
        (row,) = re.findall(rf"^\| {re.escape(name)} \| [\d,]+ M \|.*$", README, re.MULTILINE)
        cells = row.removesuffix(" |").split(" | ")
        assert cells[1] == f"{method['operations_per_tuple'] / 1e6:,.0f} M"
        rates = [f"{c['tuples_per_second']:,.0f}" for c in (ours, half)]
        assert cells[2] == f"{rates[0]} ({rates[1]})"
        memory = f"{ours['peak_memory_gb']:.1f} GB ({half['peak_memory_gb']:.1f})"
        assert cells[6] == memory
        if "times_the_peer" in ours:
            peer = method["contenders"][f"multivae-{key} float32"]
            assert cells[3].split(" ")[0] == f"{peer['tuples_per_second']:.0f}"
            assert cells[7] == f"{peer['peak_memory_gb']:.1f} GB"
            times = f"{ours['times_the_peer']:.2f}"
            if "times_the_peer" in half:
                times += f" ({half['times_the_peer']:.2f})"
            assert cells[4] == times
        shares = [f"{100 * c['share_of_floor']:.0f} %" for c in (ours, half)]
        assert cells[5] == f"{shares[0]} ({shares[1]})"


def test_the_table_of_a_gpu_is_that_of_results():
    speed = json.loads((ROOT / "results" / "throughput_h200.json").read_text())["methods"]
    for method, found in speed.items():
        found = found["contenders"]
        plain, *fast = (
            found[f"{method} {mode}"] for mode in ("float32", "float32 compiled", "bf16 compiled")
        )
        rates = "{:,.0f} ({:,.0f})".format(*(row["tuples_per_second"] for row in fast))
        shares = "{:.1f} % ({:.1f} %)".format(*(100 * row["share_of_floor"] for row in fast))
        peer, times, few = "–", "–", "–"
        if f"multivae-{method} float32" in found:
            peer = f"{found[f'multivae-{method} float32']['tuples_per_second']:,.0f}"
            times = "{:.0f} ({:.0f})".format(*(row["times_the_peer"] for row in fast))
            few = f"{plain['times_the_peer']:.1f}"
        cells = rates, peer, times, shares, f"{plain['tuples_per_second']:,.0f}", few
        assert f"| `{method}.py` | {' | '.join(cells)} |" in README


def test_commands_sh_makes_every_file_of_results_with_the_options_in_it(tmp_path):
    """Run with programs that only print their arguments. A file may be older than an option."""
    for program in ("python", "cp", "rm", "mkdir", "nvidia-smi"):
        (tmp_path / program).write_text("#!/bin/sh\nprintf '%s\\037' \"$@\"\necho\n")
        (tmp_path / program).chmod(0o755)
    shell = ["/bin/sh", str(ROOT / "results" / "commands.sh")]
    printed = subprocess.check_output(shell, cwd=tmp_path, env={"PATH": str(tmp_path)}, text=True)
    made, trained, evaluated = [], {}, {}  # files, and by the run's folder options
    for first, *words in (line.split("\x1f")[:-1] for line in printed.splitlines()):
        after = dict(itertools.pairwise(words))
        made += [after[o] for o in ("--json", "--figure", "--side-by-side") if o in after]
        if "--runs-dir" in after:  # a script's, of which benchmarks/whole_run.py has the name
            script = words.pop(0) if first.startswith("benchmarks/") else first[: -len(".py")]
            trained[after["--runs-dir"]] = script, words[: words.index("--runs-dir")]
        elif first == "evaluate.py" and words[0] in ("--importance-samples", "--proposals"):
            evaluated[words[-1][: -len("/*")]] = after
        elif len(words) == 1 and words[0].startswith("results/"):  # of cp
            made += words
            folder = first[: first.index("/*/")]
            if first.endswith("/results.json"):
                as_commanded(words[0], *trained[folder], evaluated.get(folder, {}))
    there = {f"results/{path.name}" for path in (ROOT / "results").iterdir()}
    elsewhere = "throughput_xeon.json", "throughput_k10_xeon.json"
    by_hand = "README.md", "commands.sh", "papers.json", *elsewhere
    assert sorted(made) == sorted(there - {f"results/{name}" for name in by_hand})
    shown = re.findall(r"\]\((?:results/)?(\S+\.png)\)", README + RESULTS)
    assert {f"results/{name}" for name in shown} == {n for n in there if n.endswith(".png")}


def as_commanded(file, script, argv, protocol):
    """Whether a results.json has the options of its command, and log p(X) as asked for."""
    found, arguments = evaluate.read_results(ROOT / file), importlib.import_module(script).arguments
    own = {name: found[name] for name in ("dataset", "epochs", "seed")}
    defaults = vars(arguments(["--dataset", found["dataset"]]))
    recorded = defaults | found["options"] | own
    for name, value in vars(arguments(argv)).items():
        if name in own or name not in evaluate.CIRCUMSTANCES:
            assert recorded[name] == value, (file, name)
    assert found["importance_samples"] == int(protocol.get("--importance-samples", 15)), file
    sizes = {key.count("+") for key in found if key.startswith("log_likelihood/")}
    assert (len(sizes) == 1) == (protocol.get("--proposals") == "full"), file


def test_the_300_epochs_are_as_their_log_has_them():
    with open(ROOT / "results" / "polymnist-300__mopoe__0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["tuples_per_second"]) for row in rows]
    seconds = sum(60_000 // 256 * 256 / rate for rate in rates)
    assert len(rows) == 300
    assert f"{seconds:.0f} s for the 300 epochs, at {statistics.median(rates):,.0f}" in PROSE
    for epoch in (1, 50, 100, 300):
        assert f"{float(rows[epoch - 1]['objective']):,.1f}" in RESULTS


def test_the_parts_of_the_whole_run_are_as_measured():
    found = json.loads((ROOT / "results" / "whole_run_h200.json").read_text())
    assert f"there {found['seconds_in_all']:.0f} s ([file]" in PROSE
    parts = found["seconds"]
    names = "latent accuracy", "coherence", "joint coherence", "log-likelihood"
    pictures = "pictures", "picture of latents"
    evaluation = sum(parts[name] for name in names + pictures)
    assert f"{parts['classifiers']:.0f} s for the metrics' classifiers" in PROSE
    assert f"{evaluation:.0f} s for the evaluation, {parts['imports']:.0f} s for" in PROSE


def test_the_table_of_mopoe_on_polymnist_over_beta_is_that_of_results():
    files = [ROOT / "results" / "polymnist__mopoe__0.json"]
    files += sorted((ROOT / "results").glob("polymnist-beta__mopoe__0__*.json"))
    assert len(files) > 4
    for results in map(evaluate.read_results, files):
        found = evaluate.numbers(results)
        coherence = ", ".join(f"{found[INPUTS[0][0]][n]:.1f}" for n in "1234")
        rest = (
            found[JOINT[0]][JOINT[1]],
            *(found[m]["5"] for m in ("latent accuracy, %", "log p(X), nats")),
        )
        cells = coherence, *(f"{value:.1f}" for value in rest)
        assert_row(f"{results['options']['beta']:g}", cells)


def test_the_table_of_mopoe_on_faces_is_that_of_results():
    found = {m: rows["mopoe.py"] for m, rows in measured("polymnist-faces__*.json").items()}
    joint = f"{found[JOINT[0]][JOINT[1]][0]:.1f}"
    for (metric, _), last in ((INPUTS[0], joint), (("latent accuracy, %", "1"), "–")):
        values = [found[metric].get(n) for n in "12345"]
        cells = [f"{value[0]:.1f}" if value else "–" for value in values]
        assert_row(f"{metric.removesuffix(', %')}, on faces, %", [*cells, last])


def test_the_tables_of_mopoe_on_a_gpu_are_those_of_results():
    runs = {"300 epochs": "polymnist-300__*.json", "20 epochs": "polymnist-h200__*.json"}
    runs["20 epochs, seed 1, on a CPU core"] = "polymnist-seed__*.json"
    for label, pattern in runs.items():
        found = {metric: rows["mopoe.py"] for metric, rows in measured(pattern).items()}
        joint = f"{found[JOINT[0]][JOINT[1]][0]:.1f}"
        for metric in (INPUTS[0][0], "latent accuracy, %", "log p(X), nats"):
            values = [found[metric].get(n) for n in "12345"]
            cells = [f"{value[0]:.1f}" if value else "–" for value in values]
            assert_row(label, [*cells, joint if metric == INPUTS[0][0] else "–"])
    for name, label in (
        ("exact", "float32"),
        ("tf32", "TF32 in convolutions"),
        ("amp", "`--amp`"),
    ):
        found = measured(f"polydigits-h200-{name}__*.json")
        coherence = ", ".join(f"{found[metric]['mopoe.py'][n][0]:.1f}" for metric, n in INPUTS)
        joint = evaluate.plus_minus(*found[JOINT[0]]["mopoe.py"][JOINT[1]])
        log_p = evaluate.plus_minus(*found["log p(X), nats"]["mopoe.py"]["5"])
        assert_row(label, [coherence, joint, log_p])
