"""The whole plan of a configuration: what `localpipe plan` prints, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localpipe.config.keys import Config
from localpipe.config.load import to_yaml
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.files import check_output_path, write_output
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.output import make_console
from localpipe.pipeline.stages.stage_plan import StagePlan, build_plans
from localpipe.pipeline.workers.device import emulated_key, gpu_name
from localpipe.pipeline.workers.steps import build_step_schedule
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.cluster.forecast import Forecast, forecast_on_cluster
from localpipe.plan.cluster.tables import forecast_json, forecast_remarks, forecast_tables
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.memory import list_back, recovery_memory
from localpipe.plan.notes import (
    auxiliary_notes,
    plan_notes,
    recorded_notes,
    statistics_notes,
    untrained_notes,
)
from localpipe.plan.predict import (
    THIS,
    Prediction,
    can_predict,
    check_predictable,
    describe_stages,
    predict_cuts,
    profile_for,
)
from localpipe.plan.resolve_here import load_data, resolve_here
from localpipe.plan.tables import (
    add_memory,
    back_json,
    describe_back,
    describe_crossings,
    describe_frozen,
    describe_recovery,
    memory_table,
    plan_json,
    plan_table,
    prediction_table,
)


@dataclass(frozen=True)
class WholePlan:
    """A resolved configuration with its stage plans, their costs and what is predicted.

    `plans` and `costs` have one for every stage. `predictions` holds one for every cut by name, as
    `predict_cuts` returns them, and nothing without a profile. `forecast` is for a cluster, or
    None. `data_notes` are lines for the user, on the data set and on the weights, and
    `network_notes` on the network.
    """

    config: Resolved
    plans: Sequence[StagePlan]
    costs: Sequence[StageCost]
    predictions: Mapping[str, Prediction]
    forecast: Forecast | None
    data_notes: Sequence[str] = ()
    network_notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `plan --json` prints: `schema`, `stages`, `totals`, `predicted`.

        `predicted` is None without a profile. `feedback`, a list of what comes back, is there only
        with `method.feedback`, `recovery` only with run.recover=stage. `cluster` is there only with
        a forecast, `emulated` (true) only with a prediction from the emulated GPU.
        """
        other_cuts = {name: value for name, value in self.predictions.items() if name != THIS}
        values = plan_json(self.plans, self.costs, self.predictions.get(THIS), other_cuts)
        values = add_memory(values, self.plans, self.costs, self.config)
        backs = list_back(self.plans, self.costs, self.config)
        if backs:
            values["feedback"] = [back_json(back) for back in backs]
        recovery = recovery_memory(self.plans, self.costs, self.config)
        if recovery is not None:
            values["recovery"] = asdict(recovery)
        values.update(self._emulation_json())
        if self.forecast is not None:
            values["cluster"] = forecast_json(self.forecast)
        return values

    def _emulation_json(self) -> dict[str, bool]:
        """Return `emulated: true` for predictions of the emulated GPU, else nothing."""
        if not self.predictions:
            return {}
        return emulated_key(gpu_name(self.config.run.device))

    def freeze(self, path: Path) -> None:
        """Write the configuration with every automatic choice made explicit, for `train`, as YAML.

        path: checked by `check_outputs`. Raises RunError if it cannot be written.
        """
        write_output(path, to_yaml(self.config), "file")

    def print(self) -> None:
        """Print the tables and notes on standard output, those of a forecast too."""
        console = make_console()
        console.print(plan_table(self.plans, self.costs))
        crossings = [
            *describe_crossings(self.plans),
            *describe_back(self.plans, self.costs, self.config),
            *describe_recovery(self.plans, self.costs, self.config),
        ]
        notes = [*self.data_notes, *plan_notes(self.config), *self.network_notes]
        print("\n".join([*crossings, *describe_frozen(self.plans, self.costs), *notes]))

        # What a profile predicts, where there is one.
        if self.predictions:
            console.print()
            console.print(prediction_table(self.predictions))
            print("\n".join(describe_stages(self.predictions[THIS])))
            if self._emulation_json():
                print("emulated: true")

        # A forecast has the workers' memory in its own table.
        console.print()
        if self.forecast is None:
            console.print(memory_table(self.plans, self.costs, self.config))
            return
        for table in forecast_tables(self.forecast):
            console.print(table)
            console.print()
        print("\n".join(forecast_remarks(self.forecast)))


def check_outputs(profile: Path | None, freeze: Path | None) -> None:
    """Raise UserError if a file that a plan is to write cannot be written.

    profile, freeze: of --profile with --measure, and of --freeze. None where there is none. Call it
    before the plan is made.
    """
    if freeze is not None and freeze.exists():
        raise UserError(
            f"plan: --freeze {freeze} exists and is not overwritten; "
            "give another file, or remove it"
        )
    for option, path in (("--profile", profile), ("--freeze", freeze)):
        if path is not None:
            check_output_path(f"plan: {option}", path)


def _check_forecast(config: Config) -> None:
    """Raise UserError for frozen blocks, which the peers of a forecast would train."""
    if config.model.freeze:
        raise UserError(
            f"plan: --cluster knows blocks that are trained, and model.freeze is "
            f"{list(config.model.freeze)}; leave one of them out"
        )


def make_plan(
    config: Config,
    measure: bool = False,
    profile_file: Path | None = None,
    cluster: str | None = None,
    micro_batches: str | None = None,
) -> WholePlan:
    """Plan a configuration; measure a profile, or read one, where that is asked for.

    measure, profile_file: as of `profile_for`. cluster: the YAML file of machines to forecast for,
    or one that ships. None makes no forecast, and ignores `micro_batches`. micro_batches: of the
    synchronous peers there, as `4,16`.

    Raises UserError as `data.load`, `resolve_here`, `profile_for` and `forecast_on_cluster`, and
    `check_predictable` with a profile. Raises RunError if measuring or writing a profile fails.
    """
    if measure or profile_file is not None:
        check_predictable(config)
    if cluster is not None:
        _check_forecast(config)

    # Everything that is `auto`, then the stages and what they cost.
    pretrained = load_pretrained(config.model)
    config, dataset = load_data(config, pretrained)
    profile = profile_for(config, dataset, measure, profile_file)
    resolved = resolve_here(config, dataset, profile=profile)
    blueprint, plans = build_plans(resolved)
    stages = try_stages(resolved, blueprint, plans, build_step_schedule(resolved, dataset))
    data_notes = [*dataset.notes]
    if pretrained is not None:
        data_notes.append(pretrained.describe(blueprint))
    costs = count_costs(blueprint, plans, resolved)
    network_notes = [
        *recorded_notes(resolved, blueprint),
        *untrained_notes(stages),
        *statistics_notes(resolved, stages),
        *auxiliary_notes(resolved, blueprint, plans, costs),
    ]

    # What is predicted of this machine and of a cluster.
    predictions: Mapping[str, Prediction] = {}
    # A measured cut alone does not ask for what no profile can predict.
    if profile is not None and can_predict(config):
        predictions = predict_cuts(resolved, profile)
    forecast = None
    if cluster is not None:
        forecast = forecast_on_cluster(
            config, resolved, dataset, blueprint, plans, costs, cluster, micro_batches
        )
    return WholePlan(
        resolved, plans, costs, predictions, forecast, tuple(data_notes), tuple(network_notes)
    )
