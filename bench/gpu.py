"""Everything a GPU is wanted for, in resumable parts: checks, rates, sharing a card, the paper's runs.

    python bench/gpu.py --list                                     the parts, and which are done
    python bench/gpu.py --data ROOT --part checks                  one part (name or number), or several
    python bench/gpu.py --data ROOT                                the parts that are not done, in order

It needs torch, torchvision, timm, pyarrow, scikit-learn, jaxtyping and safetensors: no Ray, no Polars. A part
stops by itself after --minutes (exit status 3, or 1 if another failed) and continues when started again; what it
measured lands in OUT/gpu_PART.json (default: bench/results), the tables of the paper's runs in RESULTS. `--tiny`
does the same at a size for the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where memlib is not installed

from gpu_checks import check  # noqa: E402
from gpu_paper import OutOfTime, Places, collect, perform_main, perform_table1  # noqa: E402
from gpu_rates import measure_rates, measure_ways  # noqa: E402
from gpu_sharing import measure_sharing  # noqa: E402
from gpu_sizes import PAPER, TINY  # noqa: E402
from timing import RESULTS, machine, save_to  # noqa: E402

DONE, FAILED, BAD_INPUT, UNFINISHED = 0, 1, 2, 3
Part = Callable[[], Mapping[str, object]]


def parts(options: argparse.Namespace, device: torch.device, until: float) -> dict[str, Part]:
    """Return the parts by name, in the order they are run in."""
    sizes, places = TINY if options.tiny else PAPER, Places(options.data, options.results, until)
    found: dict[str, Part] = {
        "checks": lambda: {"rows": check(sizes, device)},
        "rates": partial(measure_rates, sizes, device),
        "ways": partial(measure_ways, sizes, device),
        "sharing": partial(measure_sharing, sizes, device),
    }
    for name in sizes.datasets:
        for seed in sizes.run_seeds:
            found[f"{name}-{seed}"] = partial(perform_main, name, seed, sizes, device, places)
            found[f"{name}-{seed}-table1"] = partial(perform_table1, name, seed, sizes, device, places)
    found["tables"] = lambda: {"files": collect(options.results)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 the parts are done, 1 a check or a part failed, 2 bad input, 3 time is over."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: there is no CUDA device; give --tiny --device cpu to try the script here.\n")
        return BAD_INPUT
    if options.threads:
        torch.set_num_threads(options.threads)
    known = parts(options, device, time.monotonic() + 60 * options.minutes)
    done = {name for name in known if (options.out / f"gpu_{name}.json").exists()}
    if options.list:
        for number, name in enumerate(known, start=1):
            print(f"{number:2} {name:18} {'done' if name in done else 'to do'}")
        return DONE
    names = list(known)
    numbered = [names[int(p) - 1] if p.isdigit() and 0 < int(p) <= len(names) else p for p in options.part]
    if unknown := [name for name in numbered if name not in known]:
        sys.stderr.write(f"error: there is no part {unknown[0]!r}; the parts are {', '.join(names)}.\n")
        return BAD_INPUT
    return _run({n: known[n] for n in numbered or names if options.again or n not in done}, options, device)


def _run(chosen: Mapping[str, Part], options: argparse.Namespace, device: torch.device) -> int:
    status = DONE
    for name, part in chosen.items():
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            measured = part()
        except OutOfTime as over:
            print(f"{over}: start the same command again to continue.")
            return status or UNFINISHED
        except Exception:  # the parts that follow may do all the same
            traceback.print_exc()
            print(f"== {name} FAILED", flush=True)
            status = FAILED
            continue
        facts = {**machine(device), "tiny": options.tiny, "part_seconds": time.monotonic() - started}
        save_to(options.out, f"gpu_{name}", {**facts, **measured})
        print(f"== {name} done after {facts['part_seconds']:.0f} s", flush=True)
        if name == "checks" and not _told(measured["rows"]):
            status = FAILED
    return status


def _told(rows: object) -> bool:
    """Print every check and return whether none failed; one that was not run is named."""
    held = True
    for row in rows if isinstance(rows, list) else []:
        verdict = row.get("reason") or ("held" if row["held"] else "FAILED")
        print(f"{row['check']:52} {row['difference']!s:24} limit {row['limit']!s:8} {verdict}")
        held = held and row["held"] is not False
    return held


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check, time and save what needs a GPU, in resumable parts.")
    parser.add_argument("--list", action="store_true", help="name the parts and which are done")
    parser.add_argument("--part", nargs="+", default=[], metavar="NAME", help="names or numbers; default: all not done")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--data", type=Path, help="folder with cifar10/train.parquet and mnist/train.parquet")
    parser.add_argument("--results", type=Path, default=Path("results/paper-gpu"), help="for the tables of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for gpu_PART.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which a run's part stops")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--tiny", action="store_true", help="at a size for the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
