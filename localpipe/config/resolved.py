"""Facts of a resolved configuration: stages, replicas, image shape."""

from __future__ import annotations

from localpipe.config.keys import Config


def reconciles(config: Config) -> bool:
    """Return whether neighbouring gradients are reconciled: weight 0 is the axis off, and one stage has no neighbour."""
    reconcile = config.method.reconcile
    return reconcile.distance != "none" and reconcile.weight > 0 and count_stages(config) > 1


def count_stages(config: Config) -> int:
    """Return the number of stages that the configuration asks for."""
    if isinstance(config.pipeline.cuts, tuple):
        return len(config.pipeline.cuts) + 1
    return config.pipeline.stages if config.pipeline.stages is not None else 4


def replica_counts(config: Config) -> tuple[int, ...]:
    """Return the number of replicas of every stage."""
    replicas = config.pipeline.replicas
    return replicas if isinstance(replicas, tuple) else (replicas,) * count_stages(config)


def image_shape(config: Config) -> tuple[int, int, int]:
    """Return (C, H, W) of a resolved configuration's images, without its data."""
    mean, size = config.data.mean, config.data.image_size
    assert isinstance(mean, tuple) and not isinstance(size, str)
    height, width = size if isinstance(size, tuple) else (size, size)
    return len(mean), height, width
