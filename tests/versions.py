"""Which versions of packages work: the step's and the published layouts' tests with others.

    python tests/versions.py transformers==5.24.0 torch==2.11.0,transformers==5.17.0

Each argument is a fresh virtual environment with requirements.txt, in which these versions stand in
for its own. Printed is what pip or pytest says at the end; the exit code is 1 if any failed.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_step.py", "tests/test_published.py")


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def requirements(changes):
    """The lines of requirements.txt with `changes` in place of those of the same packages."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    by_name = {name_of(line): line for line in [*lines, *changes, "pytest"]}
    return list(by_name.values())


def run(command):
    """(whether a command succeeded, what it printed of failed tests, and its last line)."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, **options)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join(failed[:5] + lines[-1:])


def try_versions(changes):
    """(whether the tests pass, what pip or pytest says at the end) in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        installed, text = run([*pip, *requirements(changes)])
        if not installed:
            return False, text
        return run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS])


def main():
    passed = []
    for argument in sys.argv[1:]:
        right, text = try_versions(argument.split(","))
        print(f"{argument}: {text}", flush=True)
        passed.append(right)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
