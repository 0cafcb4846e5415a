"""Search the critical units of examples of ResNet-9 (half width, CIFAR-10), against a plain loop.

In turn in one process, on the same model, examples, noisy copies and reference batch: (a) ours, exact, float32;
(b) ours, exact, bfloat16 (float32 where bfloat16 leaves a decision open); (c) ours, fast, float32; (d) the
plain loop, written out below: one example at a time, filters edited, contiguous float32, a full backward
pass over the whole reference batch for every removal. The plain loop is run on `--plain` of the examples
and scaled by the number of removals. Printed are seconds for all examples, ratios, how far the others agree
with (a), and the verdict of each: do clean examples need more units than noisy ones (Mann-Whitney, two-sided,
p below 0.05)? `--trade-off` adds other settings of the fast mode, and judges the edited networks of (a) on
class-balanced draws of the training images instead of all. The network is trained here first on images with 10 %
label noise, or read from `--checkpoint`. Seconds are CPU seconds with `--threads 1`, else wall time. `--save`
keeps the rows in bench/results/critical_units.json, which bench/critical_units_figure.py draws.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from timing import save
from torch import Tensor, nn

from analysis.rank_test import rank_test
from memlib.checkpoints import CheckpointFolder, from_bytes, load_model_state
from memlib.config import RunConfig, build_config
from memlib.critical_units import CriticalUnitsSearch, draw_reference, find_critical_units
from memlib.datasets import ImageSet, balanced_subset, load_dataset
from memlib.edited_networks import EditedAccuracies, SplitAccuracy, edited_accuracies
from memlib.evaluation import predict
from memlib.experiments import CriticalUnitsConfig
from memlib.models import build_model
from memlib.network_units import NetworkUnits
from memlib.noisy_copies import noisy_copies
from memlib.runs import prepare_data
from memlib.seeds import stream
from memlib.storage import open_storage
from memlib.training import train
from memlib.training_state import TrainingData

EXACT = CriticalUnitsConfig(reference_size=256, max_steps=50)
FAST = replace(EXACT, reference_copies=1)  # as in the presets quick and laptop
TRADE_OFF = [
    (256, 1, 2),
    (256, 1, 4),
    (256, 5, 4),
    (64, 5, 1),
    (64, 1, 1),
    (64, 1, 4),
]  # reference size, copies, refresh
JUDGED = (1000, 500, 200, 100)  # training images
LIKELY = 0.05  # largest p of a verdict
PLAIN = "(d) plain loop"
Removals = dict[int, list[tuple[str, int]]]  # example id -> (layer, unit) in order of removal


@dataclass(frozen=True, eq=False)
class Setting:
    """What all ways are given."""

    model: nn.Module
    train: ImageSet  # with assigned labels
    is_noisy: Tensor
    examples: ImageSet
    reference: ImageSet
    seed: int
    device: torch.device
    network: dict[str, Any]  # what it was trained on, for how long, and how often it predicts as assigned


def run_config(n_images: int, epochs: int) -> RunConfig:
    """Return a run that memorizes `n_images` CIFAR-10 images within `epochs`."""
    settings = {
        "data": {"name": "cifar10", "limit": n_images},
        "model": {"width": 0.5},
        "training": {"epochs": epochs, "batch_size": 64, "peak_lr": 0.05, "schedule": "triangular", "warmup": 0.3},
    }
    return build_config(RunConfig, settings)


def prepare(options: argparse.Namespace, device: torch.device) -> Setting:
    """Return a network that has memorized its training set, and half clean, half noisy examples that it predicts."""
    kept = None
    config = run_config(options.images, options.epochs)
    if options.checkpoint:
        kept = from_bytes(options.checkpoint.read_bytes(), where=str(options.checkpoint))
        config = build_config(RunConfig, kept.facts["config"])
    dataset = load_dataset("cifar10", root=options.data)
    data = prepare_data(config, dataset)
    images = ImageSet(data.train.images, data.noisy_labels.labels, data.train.ids)
    is_noisy = data.noisy_labels.is_noisy
    model = build_model(config.model, image_shape=dataset.image_shape, num_classes=10, seed=0).to(device)
    if kept is not None:
        load_model_state(model, kept.tensors, where=str(options.checkpoint))
    else:
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = CheckpointFolder(open_storage(folder), config.run_id)
            test = dataset.test.take(torch.arange(1000))
            for record in train(
                model, TrainingData(images, is_noisy, test, "bench"), config, device=device, checkpoints=checkpoints
            ):
                shares = ", ".join(f"{k} {a.accuracy:.3f}" for k, a in record.accuracies.items())
                print(f"epoch {record.epoch:2}: {shares} ({record.seconds:.0f} s)", flush=True)
    learned = predict(model, images.images, images.labels, device=device).margin > 0
    order = torch.randperm(len(images), generator=stream(0, "bench_examples"))
    half = options.examples // 2
    chosen = torch.cat([order[(learned & kind)[order]][:half] for kind in (~is_noisy, is_noisy)])
    examples = images.take(chosen)
    reference = draw_reference(images, examples.ids, EXACT, seed=0)
    network = {
        "images": len(images),
        "epochs": config.training.epochs if kept is None else kept.facts["epoch"],
        "of_epochs": config.training.epochs,
        "clean_accuracy": learned[~is_noisy].double().mean().item(),
        "noisy_accuracy": learned[is_noisy].double().mean().item(),
    }
    return Setting(model, images, is_noisy, examples, reference, 0, device, network)


def plain_loop(setting: Setting, examples: ImageSet, units: NetworkUnits) -> tuple[Removals, int]:
    """Return the removed units and the number of removals, computed as one would first write it."""
    drawn = {"noise": EXACT.noise, "seed": setting.seed, "device": setting.device}
    others = noisy_copies(setting.reference, copies=EXACT.reference_copies, **drawn).contiguous()
    labels = setting.reference.labels.to(setting.device)
    found: Removals = {}
    for i in range(len(examples)):
        example = examples.take(torch.tensor([i]))
        inputs, label = (
            noisy_copies(example, copies=EXACT.copies, **drawn).contiguous(),
            example.labels.to(setting.device),
        )
        model = copy.deepcopy(setting.model).to(memory_format=torch.contiguous_format).eval()
        parameters = dict(model.named_parameters())
        weights = [parameters[f"{layer.name}.weight"] for layer in units.layers]
        removed: list[tuple[str, int]] = []
        for _ in range(EXACT.max_steps):
            model.zero_grad()
            own = model(inputs).mean(dim=0, keepdim=True)
            if own.argmax() != label:
                break
            logits = model(others).unflatten(0, (EXACT.reference_copies, -1)).mean(dim=0)
            (F.cross_entropy(logits, labels) - F.cross_entropy(own, label)).backward()
            scores = [(w.detach() * w.grad).flatten(1).sum(dim=1) for w in weights if w.grad is not None]
            for name, unit in removed:
                scores[[layer.name for layer in units.layers].index(name)][unit] = -torch.inf
            best = max(range(len(scores)), key=lambda index: scores[index].max().item())
            if scores[best].max() <= 0:
                break
            unit = int(scores[best].argmax())
            removed.append((units.layers[best].name, unit))
            with torch.no_grad():
                weights[best][unit] = 0
        found[int(example.ids)] = removed
    return found, sum(len(units) for units in found.values())


def removals(search: CriticalUnitsSearch) -> Removals:
    """Return the removed units by example."""
    return {e.example_id: [(unit.layer, unit.unit) for unit in e.removed] for e in search.found}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) + 1).double() / 2

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def verdict(values: dict[str, list[float]]) -> dict[str, Any]:
    """Return which kind tends to larger values, `clean`, `noisy` or `neither`, with the rank test that says so."""
    test = rank_test(pl.Series(values["clean"]), pl.Series(values["noisy"]))
    if test is None:
        return {"verdict": "neither"}
    larger = "clean" if test.auc > 0.5 else "noisy"
    return {"verdict": larger if test.p < LIKELY else "neither", "auc": test.auc, "p": test.p}


def compare(setting: Setting, search: CriticalUnitsSearch, exact: CriticalUnitsSearch) -> dict[str, Any]:
    """Return how far a search agrees with the exact one, and its numbers of removals for clean and noisy examples."""
    ours, theirs = removals(search), removals(exact)
    lengths = [len(units) if e.flipped else float("inf") for e, units in zip(search.found, ours.values(), strict=True)]
    needed, numbers = (
        by_kind(setting, search, lengths),
        by_kind(setting, search, [len(units) for units in ours.values()]),
    )
    return {
        "same_sequence": statistics.mean(ours[i] == theirs[i] for i in theirs),
        "spearman": spearman([len(ours[i]) for i in theirs], [len(theirs[i]) for i in theirs]),
        "flipped": sum(e.flipped for e in search.found),
        **{f"median_{kind}": statistics.median(n) for kind, n in numbers.items() if n},
        **{f"mean_{kind}": statistics.mean(n) for kind, n in numbers.items() if n},
        **verdict(needed),
    }


def by_kind(setting: Setting, search: CriticalUnitsSearch, values: Sequence[float]) -> dict[str, list[float]]:
    """Return the values, one an example found, apart for clean and noisy examples."""
    noisy_ids = {int(i) for i in setting.train.ids[setting.is_noisy]}
    of_kind = [(e.example_id in noisy_ids, value) for e, value in zip(search.found, values, strict=True)]
    return {
        kind: [v for noisy, v in of_kind if noisy == wanted] for kind, wanted in (("clean", False), ("noisy", True))
    }


def ways_to_search(options: argparse.Namespace) -> dict[str, CriticalUnitsConfig]:
    """Return our ways by name."""
    ways = {"(a) exact, float32": EXACT, "(c) fast, float32": FAST}
    if not options.no_bfloat16:
        ways["(b) exact, bfloat16"] = replace(EXACT, precision="bfloat16")
        ways["fast, bfloat16"] = replace(FAST, precision="bfloat16")
    for size, copies, refresh in TRADE_OFF if options.trade_off else []:
        name = f"reference {size}, copies {copies}, refresh {refresh}"
        ways[name] = replace(EXACT, reference_size=size, reference_copies=copies, refresh=refresh)
    return ways


def clock_of(options: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    """Return the clock: one thread on a shared machine is timed by its CPU time, which is what it computes."""
    return time.process_time if options.threads == 1 and device.type == "cpu" else time.perf_counter


def measure(setting: Setting, options: argparse.Namespace) -> tuple[list[dict[str, Any]], CriticalUnitsSearch]:
    """Return a row a way (seconds, ratio to the plain loop, agreement with the exact search), and the exact search."""
    now, ways = clock_of(options, setting.device), ways_to_search(options)
    order = torch.randperm(len(setting.reference), generator=stream(0, "bench_reference"))

    def ours(config: CriticalUnitsConfig) -> CriticalUnitsSearch:
        reference = setting.reference.take(order[: config.reference_size])
        return find_critical_units(
            setting.model, setting.examples, reference, config, seed=setting.seed, device=setting.device
        )

    searches, seconds = {}, {way: [] for way in [*ways, PLAIN]}
    plain: tuple[Removals, int] = ({}, 0)
    few = setting.examples.take(torch.linspace(0, len(setting.examples) - 1, options.plain).long())
    for _ in range(options.rounds):
        for way, config in ways.items():
            started = now()
            searches[way] = ours(config)
            seconds[way].append(now() - started)
            print(f"{way}: {seconds[way][-1]:.1f} s", flush=True)
        started = now()
        plain = plain_loop(setting, few, searches["(a) exact, float32"].units)
        seconds[PLAIN].append((now() - started) / plain[1])
        print(f"plain loop: {seconds[PLAIN][-1]:.2f} s a removal, {plain[1]} removals", flush=True)
    exact = searches["(a) exact, float32"]
    n_removals = sum(len(e.removed) for e in exact.found)
    plain_seconds = statistics.median(seconds[PLAIN]) * n_removals
    rows = []
    for way, search in searches.items():
        median = statistics.median(seconds[way])
        how = {
            name: getattr(ways[way], name) for name in ("reference_size", "reference_copies", "refresh", "precision")
        }
        agreement = compare(setting, search, exact)
        rows.append({"way": way, **how, "seconds": median, "ratio": plain_seconds / median, **agreement})
    same = statistics.mean(plain[0][i] == removals(exact)[i] for i in plain[0])
    rows.append({"way": f"{PLAIN}, scaled", "seconds": plain_seconds, "ratio": 1.0, "same_sequence": same})
    return rows, exact


def judge(setting: Setting, exact: CriticalUnitsSearch, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a number of training images on which the edited networks are judged, all of them first.

    drop_error: mean absolute difference of the drop in training accuracy from that on all images.
    """
    now, rows, on_all = clock_of(options, setting.device), [], []
    for limit in (len(setting.train), *(n for n in JUDGED if n < len(setting.train))):
        judged = balanced_subset(setting.train, limit, 10, stream(0, "bench_judged"))
        is_noisy = torch.isin(judged.ids, setting.train.ids[setting.is_noisy])
        for precision in ("float32", "bfloat16") if rows else ("float32",):
            started = now()
            accuracies = edited_accuracies(
                setting.model, exact.units, exact.found, (judged, is_noisy), device=setting.device, precision=precision
            )
            seconds, drops = now() - started, _drops(accuracies, is_noisy.double().mean().item())
            on_all = on_all or drops
            rows.append(
                {
                    "images": limit,
                    "precision": precision,
                    "seconds": seconds,
                    "mean_drop": statistics.mean(drops),
                    "drop_error": statistics.mean(abs(a - b) for a, b in zip(drops, on_all, strict=True)),
                    "spearman": spearman(drops, on_all),
                    **verdict(by_kind(setting, exact, drops)),
                }
            )
    return rows


def _drops(accuracies: EditedAccuracies, noisy_share: float) -> list[float]:
    shares = {"clean": 1 - noisy_share, "noisy": noisy_share}

    def lost(after: SplitAccuracy, kind: str) -> float:
        return shares[kind] * ((getattr(accuracies.before, kind) or 0.0) - (getattr(after, kind) or 0.0))

    return [sum(lost(after, kind) for kind in shares) for after in accuracies.after]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time the search for critical units against a plain loop.")
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/train.parquet")
    parser.add_argument("--checkpoint", type=Path, help="of a memlib run on CIFAR-10, instead of training")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--plain", type=int, default=4, help="examples the plain loop is run on")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-bfloat16", action="store_true")
    parser.add_argument("--trade-off", action="store_true", help="also time other settings of the fast mode")
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/critical_units.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = prepare(options, device)
    rows, exact = measure(setting, options)
    judged = judge(setting, exact, options) if options.trade_off else []
    for row in [*rows, *judged]:
        print(row)
    if options.save:
        alone = clock_of(options, device) is time.process_time
        save(
            "critical_units",
            {"rows": rows, "judged": judged},
            device,
            clock="CPU seconds" if alone else "wall seconds",
            network=setting.network,
            **{k: getattr(options, k) for k in ("examples", "plain", "rounds")},
        )


if __name__ == "__main__":
    main()
