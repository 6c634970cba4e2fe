"""What identifies and describes a W&B run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hyperfitting.config import RunConfig
from hyperfitting.fields import result_settings
from hyperfitting.store.hashing import digest

MAX_POINTS = 1000
"""Points of a curve that a run logs at most."""


@dataclass(frozen=True)
class RunInfo:
    """Which run a W&B run is of."""

    name: str
    folder: Path
    """Where its files are written."""
    config: RunConfig
    choices: Mapping[str, str] = field(default_factory=dict)
    """The chosen option of each of Hydra's groups."""
    sweep: str | None = None
    """Name of its sweep, which is its group on W&B."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """By axis of the sweep, what distinguishes it from the other runs."""
    job_type: str = "run"
    """`run` (alone), `sweep-run`, or `report` of a sweep."""

    @property
    def id(self) -> str | None:
        """Id on W&B, the same for all attempts at a run of a sweep; none: a new one each time."""
        if self.sweep is None:
            return None
        return digest([str(self.folder.absolute()), result_settings(self.config)])

    @property
    def wandb_config(self) -> dict[str, Any]:
        """The run's config on W&B, to group, filter and color by."""
        return {
            **asdict(self.config),
            "choice": {k: v for k, v in self.choices.items() if not k.startswith("hydra/")},
            "label": dict(self.labels),
        }

    @property
    def log_every(self) -> int:
        """Of so many optimizer steps one is logged, to stay below `MAX_POINTS`."""
        dataset, trainer = self.config.dataset, self.config.trainer
        steps = trainer.epochs * math.ceil(dataset.n_train / trainer.batch_size)
        return math.ceil(steps / MAX_POINTS)
