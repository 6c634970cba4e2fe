"""The measures of a run as artifacts with the steps that build them. Both models are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.geometry import geometry_step
from hyperfitting.mechanism.logit_lens import logit_lens_step
from hyperfitting.mechanism.loops import loop_steps_step
from hyperfitting.mechanism.ranks import token_shift_step
from hyperfitting.mechanism.texts import TextSource
from hyperfitting.mechanism.weight_change import weight_change_step
from hyperfitting.record.schema import SIDES, Side
from hyperfitting.store.artifact import Artifact, Step


@dataclass(frozen=True)
class MechanismArtifacts:
    """The artifacts of each measure; empty where it is not asked for."""

    geometry: dict[str, Step] = field(default_factory=dict)
    """By texts: `reference`, `tuned`, `base`."""
    ranks: dict[str, Step] = field(default_factory=dict)
    """`tuned`: along the tuned model's continuations."""
    weights: dict[str, Step] = field(default_factory=dict)
    """`all`: of all parameters."""
    lens: dict[str, Step] = field(default_factory=dict)
    """`tuned`: along the tuned model's continuations."""
    loops: dict[str, Step] = field(default_factory=dict)
    """By `TEXTS/MODEL`, such as `base/tuned`: the tuned model on the base model's texts."""

    def named(self) -> Iterator[tuple[str, Step]]:
        """Yield all steps with their names, such as `geometry/reference`."""
        for kind, steps in vars(self).items():
            for name, step in steps.items():
                yield f"{kind}/{name}", step


def mechanism_artifacts(
    cfg: MechanismConfig,
    setting: Setting,
    base: LazyModel,
    tuned: LazyModel,
    continuations: Mapping[Side, Mapping[str, Artifact]],
) -> MechanismArtifacts:
    """Return the steps of the measures that a config asks for.

    Args:
        cfg: which measures, and how.
        setting: texts, lengths and store.
        base: the base model.
        tuned: the tuned model.
        continuations: of `base` and `tuned`, by dataset.
    """
    sources = {side: TextSource(setting, base, side, continuations.get(side, {})) for side in SIDES}
    written = sources["tuned"]
    steps: dict[str, dict[str, Step]] = {}
    if "geometry" in cfg.measures:
        steps["geometry"] = {s: geometry_step(cfg, base, tuned, sources[s]) for s in SIDES}
    if "ranks" in cfg.measures:
        steps["ranks"] = {"tuned": token_shift_step(base, tuned, written)}
    if "weights" in cfg.measures:
        steps["weights"] = {"all": weight_change_step(setting, base, tuned)}
    if "lens" in cfg.measures:
        steps["lens"] = {"tuned": logit_lens_step(cfg, base, tuned, written)}
    if "loops" in cfg.measures:
        steps["loops"] = {
            f"{side}/{name}": loop_steps_step(cfg, model, base, sources[side])
            for side in ("tuned", "base")
            for name, model in (("tuned", tuned), ("base", base))
        }
    return MechanismArtifacts(**steps)
