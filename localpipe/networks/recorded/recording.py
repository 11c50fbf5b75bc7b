"""Any network as blocks: one forward pass is recorded, cut where few tensors are alive, replayed.

    network ─▶ recorder, meta device ─▶ tape ─▶ program ─▶ cuts ─▶ pieces
               training and evaluation,         steps that          replay with the network's
               three batch sizes                are needed          own modules

A piece calls the network's own modules under their own names, in the order of the recording. So
composed pieces compute the network bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe import seeds
from localpipe.errors import suggest
from localpipe.fields import dtype_name
from localpipe.networks.blueprint import BlockOutput, Companion
from localpipe.networks.recorded.batches import merge_tapes
from localpipe.networks.recorded.cut_points import (
    Cut,
    choose_cuts,
    cut_at_end,
    find_cuts,
    find_split_weights,
    list_weights_before,
    name_blocks,
)
from localpipe.networks.recorded.layouts import LAYOUTS, LayoutFinder
from localpipe.networks.recorded.opening import find_open_modules, is_layer
from localpipe.networks.recorded.piece import Piece, PieceProgram, ResizedProgram
from localpipe.networks.recorded.preparation import prepared, preserved_attributes
from localpipe.networks.recorded.program import Program, build_program, drop_extra
from localpipe.networks.recorded.recorder import TapeRecorder, find_aliases
from localpipe.networks.recorded.splitting import (
    PieceNames,
    assign_names,
    find_unused,
    split_program,
)
from localpipe.networks.recorded.tape import NoCutError, RecordingError, Tape

__all__ = ["NoCutError", "Piece", "Recording", "RecordingError", "find_aliases", "record"]

Sample = Callable[[int], tuple[Tensor, ...]]

# Three batch sizes: two give every size that grows with the batch, the third checks it.
_BATCHES = (3, 5, 8)
# So many tensors are tried where one leaves no place to cut.
_MOST_CROSSING = 8
# The block and the head of a network that is not cut.
_WHOLE = ("network", "output")


@dataclass(frozen=True)
class Recording:
    """A network as blocks, without its weights.

    names: of the blocks, without the head, whose name is `tail_name`. outputs: of every block.
    wide_boundaries: what recording with one more tensor at a cut would add, as (name of the block
    before, number of tensors). unused: the parameters that no step reads in training, which belong
    to the tail. ties: groups of names of one parameter, used on both sides of a possible cut.
    functional_batch_norms: modules that normalise by F.batch_norm with running statistics and are
    no torch layers for it. resized_outputs: of every block for the inputs of evaluations, where
    they have another shape.
    """

    names: tuple[str, ...]
    tail_name: str
    outputs: tuple[BlockOutput, ...]
    wide_boundaries: tuple[tuple[str, int], ...]
    unused: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    functional_batch_norms: tuple[str, ...]
    _programs: tuple[Mapping[bool, PieceProgram], ...] = field(repr=False)
    _state: tuple[PieceNames, ...] = field(repr=False)
    resized_outputs: tuple[BlockOutput, ...] = ()
    _resized: tuple[ResizedProgram | None, ...] = field(default=(), repr=False)

    def pieces(self, network: nn.Module) -> list[Piece]:
        """Return the blocks and, last, the head. They share the modules of `network`.

        network: any one of the recorded architecture, on any device. Raises RecordingError for
        another one.
        """
        pieces = []
        resized = self._resized or (None,) * len(self._programs)
        for programs, state, other in zip(self._programs, self._state, resized, strict=True):
            pieces.append(Piece(network, programs, state.extra, state.borrowed, other))
        return pieces


def record(
    network: nn.Module,
    image_shape_or_sample: tuple[int, ...] | Sample,
    crossing: int = 1,
    layouts: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    is_whole: bool = False,
    extra_names: Sequence[str] = (),
    evaluation_sample: Sample | None = None,
) -> Recording:
    """Return the blocks of a network, cut where at most `crossing` tensors are alive.

    network: its parameters and buffers are on the meta device. Its modes stay as they are, and so
    do the random generators. image_shape_or_sample: the shape (C, H, W) of an image, or a function
    from a batch size to the inputs on the meta device. layouts: of blocks by name, where they
    differ from what is found. aliases: from `find_aliases`, where the network was moved to the
    meta device. is_whole: the network becomes one block, and a head that gives what it takes.
    extra_names: the keys of outputs that the head gives in training, after the main one, where the
    network has them. evaluation_sample: like `image_shape_or_sample`, of the inputs of evaluations
    where they have another shape. The network is then recorded with them too.
    Raises RecordingError where the network cannot be recorded, and NoCutError where it has no place
    to cut.
    """
    sample: Sample
    if callable(image_shape_or_sample):
        sample = image_shape_or_sample
    else:
        sample = partial(_make_images, tuple(image_shape_or_sample))
    with seeds.preserved_generators(), prepared(network):
        session = _RecordSession(
            network, sample, aliases or find_aliases(network), extra_names, evaluation_sample
        )
        return session.record(crossing, layouts or {}, is_whole)


def _make_images(shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    return (torch.empty(batch, *shape, device="meta"),)


class _RecordSession:
    """The recordings of one network: fully open ones, then those whose steps are replayed."""

    def __init__(
        self,
        network: nn.Module,
        sample: Sample,
        aliases: Mapping[str, str],
        extra_names: Sequence[str] = (),
        evaluation_sample: Sample | None = None,
    ) -> None:
        self._network = network
        self._extra_names = extra_names
        self._evaluation_sample = evaluation_sample
        self._resized: Program | None = None  # for the inputs of evaluations
        self._sample = sample
        self._aliases = aliases
        self._inputs = len(sample(_BATCHES[0]))

    def record(self, crossing: int, layouts: Mapping[str, str], is_whole: bool) -> Recording:
        """Return the recording. See `record`."""
        # Fully open, to learn which modules are plain chains.
        open_tapes = {}
        written: set[str] = set()
        for is_training in (True, False):
            versions = self._read_buffer_versions()
            tape = self._run(is_training, self._sample(_BATCHES[0]), is_layer, is_strict=False)
            open_tapes[is_training] = tape
            if is_training:
                after = self._read_buffer_versions()
                written = {name for name in versions if after[name] != versions[name]}
        opened = find_open_modules(list(open_tapes.values()), self._network, self._inputs)
        programs = self._build_programs(opened, written)
        if self._evaluation_sample is not None:
            self._resized = self._build_program(False, self._evaluation_sample, opened, written)

        # The cuts that training and evaluation have in common.
        ties = self._find_ties(programs, crossing)
        if is_whole:
            cuts = {mode: [cut_at_end(program)] for mode, program in programs.items()}
            names = list(_WHOLE)
        else:
            cuts = self._find_common_cuts(programs, crossing)
            if not cuts[True]:
                raise self._explain_no_cut(programs, crossing, ties)
            names = name_blocks(programs[True], cuts[True], self._network)
        finder = LayoutFinder(open_tapes[True], self._network)
        outputs = [_describe_output(programs[True], cut, finder) for cut in cuts[True]]
        outputs = _override_layouts(names[:-1], outputs, layouts)

        resized_outputs, resized = self._split_resized(cuts[True], outputs, crossing, is_whole)

        # What each piece does in both modes. An evaluation reads the main output alone.
        programs[False], cuts[False] = _drop_extra(programs[False], cuts[False])
        split = {mode: split_program(programs[mode], cuts[mode]) for mode in (True, False)}
        pairs = list(zip(split[True], split[False], strict=True))
        return Recording(
            tuple(names[:-1]),
            names[-1],
            tuple(outputs),
            self._find_wide_boundaries(programs, crossing, cuts[True]),
            find_unused(self._network, split[True], self._aliases),
            ties,
            _find_functional_batch_norms(open_tapes.values(), self._network),
            tuple({True: first, False: second} for first, second in pairs),
            assign_names(self._network, pairs, self._aliases),
            resized_outputs,
            resized,
        )

    def _run(
        self,
        is_training: bool,
        inputs: tuple[Tensor, ...],
        is_closed: Callable[[str, nn.Module], bool],
        is_strict: bool = True,
    ) -> Tape:
        """Return the tape of one forward pass."""
        self._network.train(is_training)
        recorder = TapeRecorder(self._network, is_closed, self._aliases, is_strict)
        with preserved_attributes(self._network):
            return recorder.record(inputs)

    def _read_buffer_versions(self) -> dict[str, int]:
        """Return how often every buffer was written, by its first name."""
        versions = {}
        for name, buffer in self._network.named_buffers(remove_duplicate=False):
            versions[self._aliases[name]] = buffer._version
        return versions

    def _build_programs(self, opened: set[str], written: set[str]) -> dict[bool, Program]:
        """Return the programs of training (True) and evaluation, for all batch sizes."""

        return {
            is_training: self._build_program(is_training, self._sample, opened, written)
            for is_training in (True, False)
        }

    def _build_program(
        self, is_training: bool, sample: Sample, opened: set[str], written: set[str]
    ) -> Program:
        """Return the program of one mode for inputs of one shape, for all batch sizes."""

        def is_closed(name: str, module: nn.Module) -> bool:
            return name not in opened

        tapes = [self._run(is_training, sample(batch), is_closed) for batch in _BATCHES]
        tape = merge_tapes(tapes, _BATCHES)
        return build_program(
            tape, self._network, self._inputs, written, self._aliases, self._extra_names
        )

    def _find_common_cuts(
        self, programs: Mapping[bool, Program], crossing: int
    ) -> dict[bool, list[Cut]]:
        """Return the chosen cuts in both modes.

        A cut exists in both modes, with the same tensors in the same shapes and orders.
        """
        training = find_cuts(programs[True], crossing)
        evaluation = find_cuts(programs[False], crossing)
        weights_before = list_weights_before(programs[False], evaluation)
        weights = dict(zip(evaluation, weights_before, strict=True))
        by_key = {cut.key: cut for cut in evaluation}
        in_both = _list_weights(programs[True]) & _list_weights(programs[False])
        common = []
        for cut, before in zip(
            training, list_weights_before(programs[True], training), strict=True
        ):
            other = by_key.get(cut.key)
            if other is None or not _is_same(programs, cut, other):
                continue
            # A call may have another number in evaluation, and then be another place.
            if before & in_both == weights[other] & in_both:
                common.append(cut)
        if not common:
            return {True: [], False: []}
        if self._resized is not None:
            common = self._keep_resizable(programs[True], common, crossing)
        chosen = choose_cuts(programs[True], self._network, common)
        return {True: chosen, False: [by_key[cut.key] for cut in chosen]}

    def _keep_resizable(self, program: Program, cuts: Sequence[Cut], crossing: int) -> list[Cut]:
        """Return the cuts that the inputs of evaluations have too.

        The same tensors cross there, in other shapes, by which a piece tells its inputs apart.
        """
        assert self._resized is not None
        by_key = self._find_resized_cuts(crossing)
        kept = []
        for cut in cuts:
            other = by_key.get(cut.key)
            if other is not None and _is_resized(program, cut, self._resized, other):
                kept.append(cut)
        return kept

    def _find_resized_cuts(self, crossing: int) -> dict[tuple[str, ...], Cut]:
        """Return the cuts for the inputs of evaluations, by their keys."""
        assert self._resized is not None
        return {cut.key: cut for cut in find_cuts(self._resized, crossing)}

    def _split_resized(
        self, cuts: Sequence[Cut], outputs: Sequence[BlockOutput], crossing: int, is_whole: bool
    ) -> tuple[tuple[BlockOutput, ...], tuple[ResizedProgram, ...]]:
        """Return what blocks give for the inputs of evaluations, and what pieces do with them.

        cuts, outputs: for the other inputs.
        """
        if self._resized is None or self._evaluation_sample is None:
            return (), ()
        if is_whole:
            own_cuts = [cut_at_end(self._resized)]
        else:
            by_key = self._find_resized_cuts(crossing)
            own_cuts = [by_key[cut.key] for cut in cuts]
        resized_outputs = []
        for cut, output in zip(own_cuts, outputs, strict=True):
            resized_outputs.append(_resize_output(self._resized, cut, output))

        # A piece knows its inputs by the shape of the main one.
        shapes = [tuple(self._evaluation_sample(1)[0].shape[1:])]
        shapes += [output.shape for output in resized_outputs]
        program, own_cuts = _drop_extra(self._resized, own_cuts)
        pieces = split_program(program, own_cuts)
        resized = [ResizedProgram(*pair) for pair in zip(shapes, pieces, strict=True)]
        return tuple(resized_outputs), tuple(resized)

    def _find_ties(
        self, programs: Mapping[bool, Program], crossing: int
    ) -> tuple[tuple[str, ...], ...]:
        """Return the groups of names of the tied parameters on both sides of a possible cut."""
        groups: dict[str, list[str]] = {}
        for name, _ in self._network.named_parameters(remove_duplicate=False):
            groups.setdefault(self._aliases[name], []).append(name)
        split = find_split_weights(programs[True], crossing)
        return tuple(
            tuple(group) for name, group in groups.items() if len(group) > 1 and name in split
        )

    def _find_wide_boundaries(
        self, programs: Mapping[bool, Program], crossing: int, cuts: Sequence[Cut]
    ) -> tuple[tuple[str, int], ...]:
        """Return what one more tensor at a cut would add, where one may cross now."""
        if crossing != 1:
            return ()
        wide = self._find_common_cuts(programs, crossing + 1)[True]
        names = name_blocks(programs[True], wide, self._network)
        known = {cut.key for cut in cuts}
        boundaries = []
        for name, cut in zip(names, wide, strict=False):
            if cut.key not in known and len(cut.crossing) > crossing:
                boundaries.append((name, len(cut.crossing)))
        return tuple(boundaries)

    def _explain_no_cut(
        self, programs: Mapping[bool, Program], crossing: int, ties: tuple[tuple[str, ...], ...]
    ) -> NoCutError:
        """Return the error for a network without a place to cut."""
        network = type(self._network).__name__
        if ties:
            listed = ", ".join(" = ".join(group) for group in ties)
            return NoCutError(
                f"{network} cannot be cut, because the tied parameter {listed} is used on both "
                "sides of every cut; set model.untie: true"
            )
        split = find_split_weights(programs[True], crossing)
        if split:
            return NoCutError(
                f"{network} cannot be cut, because {min(split)} is used on both sides of every "
                "cut; offer blocks()"
            )
        for number in range(crossing + 1, _MOST_CROSSING + 1):
            count = len(self._find_common_cuts(programs, number)[True])
            if count:
                alive = "one tensor is" if crossing == 1 else f"at most {crossing} tensors are"
                return NoCutError(
                    f"{network} cannot be cut where {alive} alive; "
                    f"model.crossing: {number} gives {count} places, or offer blocks()"
                )
        return NoCutError(
            f"{network} cannot be cut, because nowhere between its layers are at most "
            f"{_MOST_CROSSING} tensors alive that have the batch first; offer blocks()"
        )


def _drop_extra(program: Program, cuts: Sequence[Cut]) -> tuple[Program, list[Cut]]:
    """Return a program without its extra outputs, and its cuts where they are then."""
    crossing = {number for cut in cuts for number in cut.crossing}
    smaller, places = drop_extra(program, [cut.after for cut in cuts], crossing)
    moved = [replace(cut, after=place) for cut, place in zip(cuts, places, strict=True)]
    return smaller, moved


def _list_weights(program: Program) -> frozenset[str]:
    """Return the first names of all weights that a program uses."""
    return frozenset().union(*program.owned)


def _is_same(programs: Mapping[bool, Program], cut: Cut, other: Cut) -> bool:
    """Whether the tensors of a cut are the same in training and evaluation."""
    for number, second in zip(cut.crossing, other.crossing, strict=True):
        one, two = programs[True].tensors[number], programs[False].tensors[second]
        if (one.shape, one.order, one.dtype) != (two.shape, two.order, two.dtype):
            return False
    return True


def _is_resized(program: Program, cut: Cut, resized: Program, other: Cut) -> bool:
    """Whether the tensors of a cut are the same in another size, and the main one has another."""
    for number, second in zip(cut.crossing, other.crossing, strict=True):
        one, two = program.tensors[number], resized.tensors[second]
        if (len(one.shape), one.order, one.dtype) != (len(two.shape), two.order, two.dtype):
            return False
    main, other_main = program.tensors[cut.crossing[0]], resized.tensors[other.crossing[0]]
    return main.shape != other_main.shape


def _resize_output(program: Program, cut: Cut, output: BlockOutput) -> BlockOutput:
    """Return what crosses a cut of a program for other inputs than those of `output`."""
    shapes = [program.tensors[number].shape[1:] for number in cut.crossing]
    companions = []
    for companion, shape in zip(output.companions, shapes[1:], strict=True):
        companions.append(replace(companion, shape=shape))
    return replace(output, shape=shapes[0], companions=tuple(companions))


def _describe_output(program: Program, cut: Cut, finder: LayoutFinder) -> BlockOutput:
    """Return what crosses a cut."""
    companions = []
    for number in cut.crossing[1:]:
        facts = program.tensors[number]
        companions.append(Companion(facts.shape[1:], dtype_name(facts.dtype), facts.order or ()))
    main = program.tensors[cut.crossing[0]]
    layout = finder.find(cut.key[0])
    return BlockOutput(main.shape[1:], layout, main.order or (), tuple(companions))


def _override_layouts(
    names: Sequence[str], outputs: Sequence[BlockOutput], layouts: Mapping[str, str]
) -> list[BlockOutput]:
    """Return outputs with the layouts that a user gives. Raises RecordingError for wrong ones."""
    by_name = dict(zip(names, outputs, strict=True))
    for name, layout in layouts.items():
        if name not in by_name:
            raise RecordingError(
                f"model.layout names the block {name}, which does not exist; {suggest(name, names)}"
            )
        shape = by_name[name].shape
        allowed = LAYOUTS.get(len(shape), ())
        if layout not in allowed:
            expected = " or ".join(allowed) or "none"
            raise RecordingError(
                f"model.layout gives {layout} for the block {name}, whose output has the shape "
                f"{shape}; expected {expected}"
            )
        by_name[name] = replace(by_name[name], layout=layout)
    return list(by_name.values())


def _find_functional_batch_norms(tapes: Any, network: nn.Module) -> tuple[str, ...]:
    """Return the modules that call F.batch_norm with running statistics, but for torch's layers."""
    found = []
    for tape in tapes:
        for step in tape.steps:
            name = getattr(step.function, "__name__", "")
            if step.module is not None or name not in ("batch_norm", "instance_norm"):
                continue
            has_statistics = any("running" in path for path in step.state) or len(step.state) > 2
            module = network.get_submodule(step.parent)
            if has_statistics and not isinstance(module, _BatchNorm) and step.parent not in found:
                found.append(step.parent)
    return tuple(found)
