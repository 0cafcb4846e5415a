"""TensorBoard scalars of a run, on request."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboardX import SummaryWriter

from memlib.training_state import EpochRecord

FOLDER = "tensorboard"


@contextmanager
def scalar_writer(results: str, run_id: str, *, enabled: bool) -> Iterator[Callable[[EpochRecord], None]]:
    """Give a function that writes an epoch's accuracies, losses and cosines; it does nothing if not `enabled`.

    `results` is a local folder. A continued run reports its finished epochs again, so what it wrote
    before is replaced.
    """
    if not enabled:
        yield lambda record: None
        return
    folder = Path(results) / FOLDER / run_id
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:

        def write(record: EpochRecord) -> None:
            for split, result in record.accuracies.items():
                writer.add_scalar(f"accuracy/{split}", result.accuracy, record.epoch)
                writer.add_scalar(f"loss/{split}", result.loss, record.epoch)
            for group in record.gradients:
                if group.cosine is not None:
                    writer.add_scalar(f"cosine/{group.group_index}_{group.group}", group.cosine, record.epoch)

        yield write
