"""Data sets as uint8 images read by index, and the augmentation of training images.

    loader(config)   -> Raw           both splits as they are: images (N, H, W, C) read by index, labels (N,)
    load             -> Dataset       validation held out, train_subset taken, mean, std and augmentation resolved
    order            -> (N,)          the training images in the order of an epoch
    augmented        -> (B, C, H, W)  a batch of them, cropped and flipped; still uint8, still in 0..255

Order and augmentation are functions of (seed, epoch, index), so a resume or another batch size finds the same images.
A loader takes the `data` section and returns a Raw; the registry names it, and it imports what it needs itself.
"""

from localpipe.data.augment import augmented, plain
from localpipe.data.dataset import Dataset, check_labels, load, order
from localpipe.data.images import Images, Raw, Recipe, Split

__all__ = [
    "Dataset",
    "Images",
    "Raw",
    "Recipe",
    "Split",
    "augmented",
    "check_labels",
    "load",
    "order",
    "plain",
]
