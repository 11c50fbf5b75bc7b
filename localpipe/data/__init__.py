"""Data sets as uint8 images read by index, their augmentation, and the batches made of them."""

from localpipe.data.dataset import load as load
