"""What the server of forks imports, so that no process does: torch's slow parts above all."""

# ruff: noqa: F401
import matplotlib.pyplot
import rich.live
import sklearn.datasets
import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.utils
import torch.export
import torch.onnx
import torch.utils.flop_counter
import torch.utils.tensorboard

import localpipe.bench.launch
import localpipe.bench.memory
import localpipe.bench.systems.local
import localpipe.bench.systems.torch_pipeline
import localpipe.bench.worker
import localpipe.cli.command_line
import localpipe.methods.auglocal
import localpipe.methods.infopro
import localpipe.methods.predsim
import localpipe.networks.chain
import localpipe.networks.resnet_cifar
import localpipe.networks.user_network
import localpipe.networks.vit
import localpipe.plan.measure_worker
import localpipe.plan.whole_plan
import localpipe.results.compare
import localpipe.results.evaluate
import localpipe.results.export
import localpipe.results.report.page
import localpipe.runs.train
import localpipe.runs.train_worker
import tests.sweep.forks.ranks

# The first values-free batch normalisation imports the reference implementations.
with torch.no_grad():
    torch.nn.BatchNorm2d(2).to("meta")(torch.empty(2, 2, 4, 4, device="meta"))
