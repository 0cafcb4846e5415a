"""Image sets as uint8 tensors with stable example ids, whatever file they come from."""

from memlib.datasets.holdout import draw_holdout as draw_holdout
from memlib.datasets.image_set import Dataset as Dataset
from memlib.datasets.image_set import ImageSet as ImageSet
from memlib.datasets.load import check_dataset_name as check_dataset_name
from memlib.datasets.load import load_dataset as load_dataset
from memlib.datasets.subset import balanced_subset as balanced_subset
