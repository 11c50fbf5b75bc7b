"""The network of the recorded runs: normalisation, dropout, an in-place ReLU behind every cut."""

from torch import nn


def network(num_classes: int, width: int) -> nn.Sequential:
    """Return five blocks and a head for RGB images."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(nn.ReLU(inplace=True), conv, nn.BatchNorm2d(outputs), nn.Dropout(0.1))

    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))
    last = [block(width, 2 * width, 2), block(2 * width, 2 * width, 1)]
    return nn.Sequential(stem, block(width, width, 1), block(width, width, 1), *last, head)
