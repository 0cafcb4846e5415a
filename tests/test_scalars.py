from memlib.evaluation import Accuracy
from memlib.gradient_accounting import GroupGradient
from memlib.training_state import EpochRecord
from sweeps.scalars import scalar_writer


def record(epoch):
    group = GroupGradient("conv1", 0, 1.0, 1.0, 1.0, -0.5, 10)
    return EpochRecord(epoch, {"noisy": Accuracy(0.25, 1.5, 4)}, (group,), 1.0)


def test_an_epochs_accuracies_losses_and_cosines_are_written(tmp_path):
    with scalar_writer(str(tmp_path), "run", enabled=True) as write:
        write(record(1))
    (events,) = (tmp_path / "tensorboard" / "run").iterdir()
    content = events.read_bytes()
    assert all(tag in content for tag in (b"accuracy/noisy", b"loss/noisy", b"cosine/0_conv1"))


def test_a_continued_run_replaces_what_it_wrote_before(tmp_path):
    for _ in range(2):
        with scalar_writer(str(tmp_path), "run", enabled=True) as write:
            write(record(0))
    assert len(list((tmp_path / "tensorboard" / "run").iterdir())) == 1


def test_nothing_is_written_unasked(tmp_path):
    with scalar_writer(str(tmp_path), "run", enabled=False) as write:
        write(record(0))
    assert list(tmp_path.iterdir()) == []
