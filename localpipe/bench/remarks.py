"""The sentences below a benchmark's tables: where a peer leads, the prediction, notes, commands."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.modules.batchnorm import _BatchNorm

from localpipe.bench.rows import Row, label_row, read_rate
from localpipe.bench.systems.spec import find_system
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import build_blueprint

_CLEARLY_LESS = 0.98  # of localpipe's memory; what is nearer is the same
# How a sentence names a figure of memory, and its key.
_MEMORY = (
    ("a process", "peak_memory_bytes"),
    ("saved for backward", "saved_activation_bytes_per_sample"),
)


def describe_jitter(group: Sequence[Row]) -> list[str]:
    """Return a line for every row that has a jitter's cost, in the order of the rows.

    group: rows of `build_rows`. Only a chain with jitter has a cost: the share of the throughput
    that is lost against the same chain without jitter. The list is empty where no row has one.
    """
    lines = []
    for row in group:
        if row["jitter_cost"] is not None:
            cost = f"{100 * row['jitter_cost']:.1f} %"
            lines.append(f"the jitter costs {cost} of the throughput of the same chain without it")
    return lines


def describe_leads(group: Sequence[Row]) -> list[str]:
    """Return where a peer is ahead of localpipe, or that none is faster.

    group: rows of `build_rows`. First comes a line for each faster peer, the fastest first, or one
    line that none is faster. Then come peers whose memory, in a process or saved for backward, is
    below 98 % of localpipe's. The list is empty where localpipe or all peers have no figures.
    """
    subject = _find_subject(group)
    peers = []
    for row in group:
        if row["best_peer"] is not None and find_system(row["system"]).is_peer:
            peers.append(row)
    if subject is None or not peers:
        return []

    faster = []
    for row in sorted(peers, key=read_rate, reverse=True):
        ratio = row["ratio_to_best_peer"] / subject["ratio_to_best_peer"]
        if ratio > 1:
            faster.append(f"{row['system']} is faster than localpipe: {ratio:.2f}x")
    if not faster:
        ratio = subject["ratio_to_best_peer"]
        faster.append(f"no peer here is faster than localpipe: {ratio:.2f}x the best of them")
    return [*faster, *_describe_memory(subject, peers)]


def _find_subject(group: Sequence[Row]) -> Row | None:
    """Return localpipe's row, if it has figures."""
    for row in group:
        if row["samples_per_s"] and find_system(row["system"]).is_subject:
            return row
    return None


def _describe_memory(subject: Row, peers: Sequence[Row]) -> list[str]:
    """Return which peers need clearly less memory than localpipe."""
    lines = []
    for name, key in _MEMORY:
        largest = max(subject[key])
        for row in peers:
            if max(row[key]) < _CLEARLY_LESS * largest:
                ratio = max(row[key]) / largest
                lines.append(
                    f"{row['system']} needs less memory {name} than localpipe: {ratio:.2f}x"
                )
    return lines


def describe_accumulation(group: Sequence[Row]) -> list[str]:
    """Return what accumulated messages change, a line for each row of localpipe beside its first.

    group: rows of `build_rows`. The list is empty where localpipe has fewer than two rows with
    figures.
    """
    subject = _find_subject(group)
    lines = []
    for row in group:
        is_variant = row is not subject and find_system(row["system"]).is_subject
        if subject is None or not is_variant or not row["samples_per_s"]:
            continue
        speed = row["samples_per_s"] / subject["samples_per_s"]
        figures = [f"{speed:.2f}x the speed of {label_row(subject)}"]
        for name, key in _MEMORY:
            ratio = max(row[key]) / max(subject[key])
            figures.append(f"{ratio:.2f}x the memory {name}")
        lines.append(f"{label_row(row)} accumulated messages: {', '.join(figures)}")
    return lines


def describe_prediction(rows: Sequence[Row]) -> list[str]:
    """Return one line with the predicted throughput of localpipe and its error in per cent.

    rows: of `build_rows`. The first row with a prediction counts. The list is empty where no row
    has one.
    """
    for row in rows:
        if row["predicted_samples_per_s"] is not None:
            error = 100 * (row["predicted_over_measured"] - 1)
            profiles = " ".join(f"{rate:.1f}" for rate in row["predicted_samples_per_s_runs"])
            return [
                f"plan --measure predicts {row['predicted_samples_per_s']:.1f} samples/s of "
                f"localpipe: {error:+.1f} % against the {row['samples_per_s']:.1f} measured "
                f"(profiles: {profiles})"
            ]
    return []


def describe_notes(rows: Sequence[Row], config: Resolved) -> list[str]:
    """Return why systems have no figures, and what is not the same in every row.

    rows: of `build_rows`. First comes a line for every row with a note, in order. Rows with
    micro-batches add a line on waits, and, for a network with batch normalisation, one on its
    batches. The list is empty where nothing needs a note.
    """
    lines = []
    for row in rows:
        if row["note"] is not None:
            lines.append(f"note: {label_row(row)}: {row['note']}")
    counts = _list_micro_batches(rows)
    batch = config.data.batch_size
    if counts and _normalises_batches(config):
        sizes = ", ".join(str(batch // count) for count in counts)
        lines.append(
            f"note: batch normalisation sees micro-batches of {sizes} samples in the pipelines of "
            f"torch, {_describe_messages(rows, batch)} in localpipe, the whole batch of {batch} in "
            "e2e, each process's share in ddp"
        )
    if counts:
        lines.append(
            "note: the receive wait of a torch pipeline holds its send waits too; "
            "ddp hides its waits in backward"
        )
    return lines


def _list_micro_batches(rows: Sequence[Row]) -> list[int]:
    """Return the numbers of micro-batches of the peers, ascending."""
    counts = set()
    for row in rows:
        if row["micro_batches"] is not None and find_system(row["system"]).has_micro_batches:
            counts.add(row["micro_batches"])
    return sorted(counts)


def _describe_messages(rows: Sequence[Row], batch: int) -> str:
    """Return the sizes of localpipe's messages, the largest first."""
    sizes = set()
    for row in rows:
        if find_system(row["system"]).is_subject:
            sizes.add(batch // (row["micro_batches"] or 1))
    texts = ", ".join(str(size) for size in sorted(sizes, reverse=True))
    return f"messages of {texts or batch}"


def _normalises_batches(config: Resolved) -> bool:
    """Return whether a layer of the network depends on the whole batch."""
    blueprint = build_blueprint(config)
    for part in blueprint.build_meta(range(len(blueprint.parts))):
        if any(isinstance(module, _BatchNorm) for module in part.modules()):
            return True
    return False


def list_commands(rows: Sequence[Row], config: Resolved, command: str) -> list[str]:
    """Return the command that measures one row alone, for every number of micro-batches, ascending.

    Each one ends in `--systems a|b|c`: all systems of that number and all without one, in the order
    of the rows, each once. Without micro-batches there is one command. Then comes one for each row
    of localpipe with more messages than the configuration has. config: localpipe's. command: as
    typed, without flags.
    """
    counts: list[int | None] = [*_list_micro_batches(rows)]
    lines = []
    for count in counts or [None]:
        names: list[str] = []
        for row in rows:
            is_pipeline = find_system(row["system"]).has_micro_batches
            is_other = is_pipeline and row["micro_batches"] != count
            if not is_other and row["system"] not in names:
                names.append(row["system"])
        option = ""
        if count is not None:
            option = f" --micro-batches {count}"
        lines.append(f"{command}{option} --systems {'|'.join(names)}")

    # localpipe with as many messages as peers have micro-batches.
    configured = (None, config.optim.accumulate)
    for row in rows:
        if find_system(row["system"]).is_subject and row["micro_batches"] not in configured:
            lines.append(row["command"])
    return lines
