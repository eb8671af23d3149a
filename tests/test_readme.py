"""README's worked example and commands do what README says."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


FORK, FILE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_files_that_readme_links_to_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
