"""How long the plan says a sweep takes, and how long it then takes, on this machine.

Each sweep is started as a user starts it; its estimate is read from the line it prints before anything is
computed, and the time from that line to its end is taken. `--tiny` takes a smaller one only. Both are wall time,
so this wants a machine with nothing else to do; the estimate knows what was going on when it was made, not what
began later. `--save` keeps the rows in bench/results/estimates.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import save

COMMAND = Path(__file__).parents[1] / "sweeps" / "full_paper.py"
UNITS = {"s": 1, "min": 60, "h": 3600}
TINY = {"training alone, tiny": ["--limit", "200", "--epochs", "10", "--set", "model.width=0.0625", "--experiments"]}
SWEEPS = {
    "training alone": ["--experiments"],
    "one run of ResNet-9 at full width, 32 x 32": [
        *("--experiments", "--seeds", "0", "--epochs", "2", "--limit", "400"),
        *("--set", "model.width=1.0", "--set", "data.image_size=32"),
    ],
    "the preset quick, all experiments": [],
}


def compare(options: list[str]) -> tuple[float, float]:
    """Return the estimated and the measured seconds of a sweep of the preset quick with these options."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(COMMAND), "--preset", "quick", "--results", folder, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        estimated, started = None, 0.0
        for line in process.stdout or ():
            found = re.search(r": about ([\d.]+) (s|min|h)\b", line)
            if found and estimated is None:
                estimated, started = float(found[1]) * UNITS[found[2]], time.perf_counter()
        if process.wait() != 0 or estimated is None:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}; see its error above.")
        return estimated, time.perf_counter() - started


def main() -> None:
    """Run the sweeps and print estimate, outcome and their ratio."""
    parser = argparse.ArgumentParser(description="Compare the time a sweep is estimated to take with what it takes.")
    parser.add_argument("--tiny", action="store_true", help="one sweep of seconds")
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/estimates.json")
    options = parser.parse_args()
    rows = []
    for name, arguments in (TINY if options.tiny else SWEEPS).items():
        estimated, measured = compare(arguments)
        rows.append({"sweep": name, "estimated_seconds": estimated, "seconds": measured, "ratio": measured / estimated})
        print(f"{name:44} estimated {estimated:5.0f} s, took {measured:5.0f} s: ratio {measured / estimated:.2f}")
    if options.save:
        save("estimates", {"rows": rows}, torch.device("cpu"))


if __name__ == "__main__":
    main()
