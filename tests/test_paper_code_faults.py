"""Each fault of the paper's released code is pinned here, as the part that could repeat it is written."""

import torch

from memlib.label_noise import flip_labels
from memlib.seeds import stream


def test_every_wrong_label_is_drawn_and_all_equally_often():
    """The released code never drew the last of the K-1 wrong labels, (label + K - 1) % K."""
    num_classes, n = 10, 100_000
    labels = torch.arange(n) % num_classes
    noisy = flip_labels(labels, num_classes=num_classes, fraction=0.9, generator=stream(0, "label_noise"))
    offsets = torch.bincount((noisy.labels - labels)[noisy.is_noisy] % num_classes, minlength=num_classes)
    assert offsets[0] == 0
    expected = 0.9 * n / (num_classes - 1)  # 10,000 each, standard deviation 94
    assert ((offsets[1:] - expected).abs() < 500).all(), offsets.tolist()
