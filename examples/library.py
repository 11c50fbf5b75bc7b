"""localpipe from a training script: train, then use the network. `python examples/library.py`"""

import torch

from localpipe import configuration, load, train

if __name__ == "__main__":  # workers may import a script; see custom_objective.py
    config = configuration(
        "demo", "model.name=resnet8", "optim.epochs=1", "run.dir=runs/library", "run.threads=1"
    )
    summary = train(config)
    exits = summary["test_accuracy_per_stage"]
    print(f"accuracy {summary['test_accuracy']:.3f}; of every stage's exit {exits}")

    network = load("runs/library")  # an nn.Module; later, from a file that `localpipe export` wrote
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    print("class", int(network(images).argmax()))
