"""The runs that decide claims: of each experiment and scale the newest complete sweep."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from hyperfitting.reporting.claims.quantities import NotMeasuredError
from hyperfitting.reporting.claims.schema import Quantity, Scale
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords, load_sweep
from hyperfitting.runtime.strict_model import StrictModel
from hyperfitting.sweep.spec import SPEC_FILE

_MODEL_AXIS, _SEED_AXIS = "model", "seed"


class CountedSweep(StrictModel):
    """The sweep that counts where an experiment has others at a scale."""

    experiment: str = Field(description="file of `experiments/`, such as `table1`")
    scale: str = Field(description="`embedded` or `paper`")
    counted: str = Field(description="its folder; empty: none counts")
    others: list[str] = Field(
        description="folders of those that do not count: older, not complete, of other settings"
    )


@dataclass(frozen=True)
class Sweeps:
    """The runs that count, by experiment and scale."""

    runs_of: Mapping[tuple[str, str], Sequence[RunEntry]]
    counted: Sequence[CountedSweep] = ()
    """Where an experiment has several sweeps."""
    incomplete: frozenset[tuple[str, str]] = frozenset()
    """Experiments and scales of which runs have not finished."""

    def _runs(self, quantity: Quantity, scale: Scale) -> list[RunEntry]:
        wanted = {
            axis: [labels] if isinstance(labels, str) else labels
            for axis, labels in quantity.labels.items()
        }
        return [
            run
            for run in self.runs_of.get((quantity.experiment, scale), ())
            if all(run.labels.get(axis) in labels for axis, labels in wanted.items())
        ]

    def by_model(
        self, quantity: Quantity, scale: Scale, model: str | None
    ) -> dict[str | None, dict[int, list[RunEntry]]]:
        """Return the runs of a quantity by model and seed, without seeds that have not finished.

        Args:
            quantity: of which runs.
            scale: of the sweep.
            model: the one that a claim is about; it is looked for at `scale=paper`. None: all.

        Raises:
            NotMeasuredError: there is none.
        """
        runs = self._runs(quantity, scale)
        if scale == "paper" and model is not None:
            runs = [run for run in runs if run.labels.get(_MODEL_AXIS) in (None, model)]
        groups: dict[tuple[str | None, str], list[RunEntry]] = {}
        for run in runs:
            key = run.labels.get(_MODEL_AXIS), run.labels.get(_SEED_AXIS, "")
            groups.setdefault(key, []).append(run)
        by_model: dict[str | None, dict[int, list[RunEntry]]] = {}
        for (name, _), group in groups.items():
            records = [run.record for run in group if run.record is not None]
            if len(records) < len(group):
                continue  # fewer runs would be another quantity
            by_seed = by_model.setdefault(name, {})
            for run, record in zip(group, records, strict=True):
                by_seed.setdefault(int(record.config["seed"]), []).append(run)
        if not by_model:
            missing = next(
                (run.missing for run in runs if run.record is None), "not run at this scale"
            )
            raise NotMeasuredError(f"{quantity.experiment}: {missing}")
        return by_model


def sweep_folders(folders: Iterable[Path]) -> list[Path]:
    """Return the folders of the sweeps in some folders, each a sweep's or one of sweeps."""
    return [
        path
        for folder in folders
        for path in (
            [folder]
            if (folder / SPEC_FILE).is_file()
            else sorted(spec.parent for spec in folder.glob(f"*/{SPEC_FILE}"))
        )
    ]


def load_sweeps(folders: Iterable[Path]) -> Sweeps:
    """Return the runs of the sweeps in some folders, each a sweep's or one of sweeps.

    An experiment may have several sweeps at a scale, such as those of different code: the newest
    counts, of the complete ones if there are any. A sweep whose command changes the experiment
    (such as its learning rate) is another experiment, and does not count.

    Raises:
        UserError: a sweep is damaged.
    """
    sweeps_of: dict[tuple[str, str], list[SweepRecords]] = {}
    for folder in sweep_folders(folders):
        sweep = load_sweep(folder)
        sweeps_of.setdefault((sweep.spec.experiment, sweep.spec.scale), []).append(sweep)
    runs_of, counted, incomplete = {}, [], set()
    for (experiment, scale), sweeps in sweeps_of.items():
        candidates = [sweep for sweep in sweeps if not sweep.spec.changing_overrides]
        chosen = _newest_complete(candidates) if candidates else None
        if chosen is not None:
            runs_of[experiment, scale] = chosen.runs
            if not chosen.is_complete:
                incomplete.add((experiment, scale))
        others = [sweep.folder.name for sweep in sweeps if sweep is not chosen]
        if others:
            counted.append(
                CountedSweep(
                    experiment=experiment,
                    scale=scale,
                    counted=chosen.folder.name if chosen is not None else "",
                    others=others,
                )
            )
    return Sweeps(runs_of, counted, frozenset(incomplete))


def _newest_complete(sweeps: Sequence[SweepRecords]) -> SweepRecords:
    """Return the sweep that counts of several: the newest, of the complete ones if there are any.

    Its records have the time, and not its files, which are newer in a copy. Of equal times, such as
    those of a copy, or of none in records of earlier versions, the first by name counts.
    """
    by_name = sorted(sweeps, key=lambda sweep: sweep.folder.name)
    return max(by_name, key=lambda sweep: (sweep.is_complete, sweep.finished_at))
