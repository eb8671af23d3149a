"""README's worked example and commands do what README says."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_fork_of_readme_trains_and_evaluates(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = (ROOT / "mopoe.py").read_text()
    head, tail = script.split("\n\n\ndef arguments", 1)
    (tmp_path / "mymopoe.py").write_text(f"{head}\n\n{block}\n\ndef arguments{tail}")

    def python(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--dataset halves" in README
    out = python("mymopoe.py", "--dataset", "halves")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("halves__mymopoe__0__") and "joint coherence" in out
    results = (run / "results.json").read_text()
    assert json.loads(results)["latent_accuracy/left+right"] > 0.7
    assert python("evaluate.py", f"runs/{run.name}") == out.split("run:")[0]
    assert (run / "results.json").read_text() == results


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
