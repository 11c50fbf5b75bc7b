"""Memory of InfoPro's balanced stages on one device, beside what its paper has published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from localpipe.bench.memory import BALANCED, PUBLISHED_GB
from localpipe.bench.memory_step import measure_cuda_peak
from localpipe.doctor.gpu.device_work import resolve_words
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.pipeline.stages.stage_plan import build_blueprint

_NETWORK, _IMAGE = "resnet110", 32  # of the paper
_STAGES = (2, 3, 4)
_TOLERANCE = 0.08  # the paper's allocator and ours differ


def run(context: StepContext) -> None:
    """Add a finding for end-to-end training, and one for every number of stages."""
    context.note_machine()
    end_to_end = _measure_end_to_end(context)
    if end_to_end is None:
        return
    batch, end_to_end_bytes = end_to_end
    for stages, cuts in _list_cuts(context):
        name = f"InfoPro, K = {stages}"
        peak = _measure_peak(context, batch, ["method=infopro", *_list_cut_words(stages, cuts)])
        if peak is None:
            context.add_failure(name, f"the device is too small for a batch of {batch}")
            continue
        _add_saving(context, name, stages, 1 - peak / end_to_end_bytes, peak)


def _measure_end_to_end(context: StepContext) -> tuple[int, int] | None:
    """Add the peak of end-to-end training, and return (batch, bytes).

    The batch is halved, twice at most, on a device that is too small. None if that does not help.
    """
    batches = [context.size.memory_batch >> halved for halved in range(3)]
    for batch in batches:
        peak = _measure_peak(context, batch, ["pipeline.stages=1"], segments=1)
        if peak is not None:
            text = f"{_format_gib(peak)} at batch {batch}"
            context.add_ok("end to end", text, peak_memory_bytes=peak, batch=batch)
            return batch, peak
    context.add_failure("end to end", f"the device is too small for a batch of {batches[-1]}")
    return None


def _list_cuts(context: StepContext) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield the numbers of stages and the papers' cuts of balanced memory."""
    for stages, cuts in BALANCED[context.size.memory_network].items():
        if stages in _STAGES:
            yield stages, cuts


def _list_cut_words(stages: int, cuts: Sequence[int]) -> list[str]:
    return [f"pipeline.stages={stages}", f"pipeline.cuts={','.join(map(str, cuts))}"]


def _measure_peak(
    context: StepContext, batch: int, words: Sequence[str], segments: int | None = None
) -> int | None:
    """Return the allocator's peak in bytes of some steps, None where the device is too small."""
    size = context.size
    config = resolve_words(
        [
            f"model.name={size.memory_network}",
            "data.name=synthetic",
            f"data.samples={batch}",
            f"data.image_size={size.memory_image}",
            f"data.batch_size={batch}",
            "pipeline.processes=1",
            "run.device=cuda",
            "run.threads=1",
            *words,
        ]
    )
    try:
        return measure_cuda_peak(config, build_blueprint(config), segments)
    except torch.OutOfMemoryError:
        return None


def _add_saving(context: StepContext, name: str, stages: int, saving: float, peak: int) -> None:
    """Add a finding, beside the published saving if the network is the paper's."""
    size = context.size
    text = f"{_format_gib(peak)}, {-100 * saving:+.1f} %"
    figures = {"peak_memory_bytes": peak, "saving": round(saving, 4), "published": None}
    if (size.memory_network, size.memory_image) != (_NETWORK, _IMAGE):
        context.add_ok(name, f"{text}; nothing is published for this network", **figures)
        return
    published = 1 - PUBLISHED_GB["infopro", "balanced", stages] / PUBLISHED_GB["e2e", "", 1]
    figures["published"] = round(published, 4)
    add = context.add_ok if abs(saving - published) <= _TOLERANCE else context.add_failure
    add(name, f"{text}; published {-100 * published:+.1f} %", **figures)


def _format_gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
