"""Which versions of packages work: the step's and the published layouts' tests with others.

    python tests/versions.py transformers==5.0.0 torch==2.11.0,transformers==5.17.0

Each argument is a fresh virtual environment with requirements.txt, in which these versions stand in
for its own. One line is printed for each; the exit code is 1 where any of them failed.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_step.py", "tests/test_published.py")
MINUTES = 20  # for an installation, and for the tests


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def requirements(changes):
    """The lines of requirements.txt with `changes` in place of those of the same packages."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    by_name = {name_of(line): line for line in [*lines, *changes, "pytest"]}
    return list(by_name.values())


def last_line(command):
    """(whether a command succeeded, the last line that it printed)."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=60 * MINUTES, **options)
    except subprocess.TimeoutExpired:
        return False, f"not finished after {MINUTES} minutes"
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1]


def try_versions(changes):
    """(whether the tests pass, what pip or pytest says at the end) in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        installed, text = last_line([*pip, *requirements(changes)])
        if not installed:
            return False, text
        return last_line([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS])


def main():
    passed = []
    for argument in sys.argv[1:]:
        right, text = try_versions(argument.split(","))
        print(f"{argument}: {text}", flush=True)
        passed.append(right)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
