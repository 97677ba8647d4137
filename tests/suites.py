"""Run the test suites side by side, and print their output and one summary: `make test`.

Most tests of the clusters wait for something, so another suite uses the cores meanwhile. Each suite is a pytest process
of its own; the arguments are options for each of them. The last line is `N passed, N failed`; a test that ends with an
error has failed.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET  # what is read was written by pytest a moment ago
from dataclasses import dataclass
from pathlib import Path

SUITES = {
    "unit": ["tests/unit", "tests/attacks"],
    "cluster": ["tests/cluster", "tests/faults"],
    "e2e": ["tests/e2e"],
}
FOLDER = Path("build/tests")
EVERY = 60.0  # seconds between two lines of progress


@dataclass
class Suite:
    """One pytest process and its output."""

    name: str
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    def progress(self) -> str:
        """Return how far the suite is, as pytest's own dots say it."""
        if self.process.poll() is not None:
            return f"{self.name} has ended"
        shares = [line.rpartition("[")[2] for line in self.log.read_text(errors="replace").splitlines() if "%]" in line]
        return f"{self.name} {shares[-1].rstrip(']').strip()}" if shares else f"{self.name} has begun"

    def counts(self) -> tuple[int, int]:
        """Return how many tests passed and failed. A suite that ends without a result has failed."""
        try:
            found = ET.parse(FOLDER / f"{self.name}.xml").getroot().iter("testsuite")
            results = [
                {key: int(each.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for each in found
            ]
        except (OSError, ET.ParseError):
            return 0, 1
        bad = sum(each["failures"] + each["errors"] for each in results)
        passed = sum(each["tests"] - each["skipped"] for each in results) - bad
        return max(passed, 0), bad if self.process.returncode == 0 else max(bad, 1)


def start(name: str, paths: list[str]) -> Suite:
    (FOLDER / f"{name}.xml").unlink(missing_ok=True)
    with (FOLDER / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-m", "pytest", *sys.argv[1:], f"--junitxml={FOLDER / name}.xml", *paths]
        return Suite(name, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    suites = [start(name, paths) for name, paths in SUITES.items()]
    try:
        while any(suite.process.poll() is None for suite in suites):
            for _ in range(int(EVERY)):
                if all(suite.process.poll() is not None for suite in suites):
                    break
                time.sleep(1)
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:5.1f} min: " + ", ".join(suite.progress() for suite in suites), flush=True)
    except KeyboardInterrupt:  # the terminal has sent it to the suites, too: they clean up
        for suite in suites:
            suite.process.wait()
    for suite in suites:
        print(f"\n==> {suite.name}", flush=True)
        sys.stdout.buffer.write(suite.log.read_bytes())
        sys.stdout.flush()
    counts = [suite.counts() for suite in suites]
    for suite, (good, bad) in zip(suites, counts, strict=True):
        print(f"{suite.name}: {good} passed, {bad} failed")
    passed, failed = (sum(column) for column in zip(*counts, strict=True))
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    sys.exit(main())
