"""Use an export without localpipe: `python examples/load_exported.py net.pt`, or net.pt2."""

import json
import sys

import torch
from own_network import convnet  # yours; for net.pt2 not needed

images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)

if sys.argv[1].endswith(".pt2"):  # a program: uint8 images in, logits out
    logits = torch.export.load(sys.argv[1]).module()(images)
else:  # a state_dict: the network is yours, and so is the normalisation
    weights = torch.load(sys.argv[1], weights_only=True)
    network = convnet(num_classes=10, width=16)
    network.load_state_dict(weights)
    metadata = json.loads(weights._metadata[""]["localpipe"])  # the model card has the same
    config = metadata["config"]["data"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    logits = network.eval()((images / 255 - mean) / std)
print(logits.argmax(1).tolist())
