"""The config group `trainer`, and the settings of a training job taken together."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from hyperfitting.errors import UserError
from hyperfitting.fields import (
    RUNTIME,
    above_zero,
    at_least,
    id_config,
    in_range,
    one_of,
    required,
    setting,
)
from hyperfitting.models.config import TuningConfig
from hyperfitting.runtime.config import HardwareConfig

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


@dataclass
class TrainerConfig:
    """The training loop."""

    epochs: int = setting(20, enters="tuned")
    """Passes over the training sequences."""
    batch_size: int = setting(8, enters="tuned")
    """Sequences per optimizer step. The last batch of an epoch may be smaller."""
    precision: str = setting("float32", enters="tuned")
    """`float32`; `tf32`: the same with TF32 matrix products, on NVIDIA GPUs from Ampere on; or
    autocast to `bfloat16` or `float16` around float32 weights. Evaluation is in the weights' dtype,
    and so is validation in one process; several processes with `bfloat16` validate in bfloat16."""
    clip_norm: float | None = setting(None, enters="tuned")
    """Maximum gradient norm; null: no clipping (as in the paper)."""
    dropout: bool = setting(False, enters="tuned")
    """Keep the model's own dropout. Off: every dropout probability is set to 0."""
    activation_cache: str = setting("float32", enters="tuned")
    """With a `late_…` tuning: the output of the frozen layers is computed once per sequence and
    stored as `float32` (exact) or `bfloat16` (half the size); `off`: recomputed in every epoch.
    Not used with dropout."""
    target_loss: float | None = setting(None, enters="tuned")
    """Stop after the first epoch whose mean training loss (nats) is at or below this."""
    target_accuracy: float | None = setting(None, enters="tuned")
    """Stop after the first validated epoch after which the model predicts at least this share of
    the training tokens (arXiv 2602.11149); each validation then goes over them too."""
    target_entropy: float | None = setting(None, enters="tuned")
    """Stop after the first validation whose mean predictive entropy (nats) is at or below this."""
    target_ttr: float | None = setting(None, enters="tuned")
    """Stop after the first validation whose continuations have at least this type-token ratio."""
    swaps: int = setting(0, enters="tuned")
    """Swap this many sequences of the first epoch's first batch with those of its second: an almost
    identical data order (Figure 5, left, of Carlsson et al.)."""
    allow_lost_updates: bool = setting(False, enters=RUNTIME)
    """Train weights in float16 or bfloat16 without stochastic rounding, although updates far below
    their spacing are lost (with Adam at 1e-6: all of them)."""
    eval_every_epochs: int = setting(1, enters="validation")
    """Epochs between validations; the last epoch is always validated."""
    val_prompts: int = setting(32, enters="validation")
    """Validation sequences whose first tokens are continued greedily, for TTR."""
    val_prompt_len: int = setting(32, enters="validation")
    """Tokens of such a prompt."""
    val_max_new_tokens: int = setting(96, enters="validation")
    """Tokens of such a continuation; 2 or more."""
    seed: int = setting(MISSING, enters="tuned")
    """Data order, adapter initialization and dropout."""

    def __post_init__(self) -> None:
        at_least("trainer.epochs", self.epochs, 1)
        at_least("trainer.batch_size", self.batch_size, 1)
        one_of("trainer.precision", self.precision, PRECISIONS)
        one_of("trainer.activation_cache", self.activation_cache, ("float32", "bfloat16", "off"))
        above_zero("trainer.clip_norm", self.clip_norm)
        at_least("trainer.target_loss", self.target_loss, 0)
        at_least("trainer.target_entropy", self.target_entropy, 0)
        for name in ("target_accuracy", "target_ttr"):
            if (share := getattr(self, name)) is not None:
                in_range(f"trainer.{name}", share, 0, 1)
        at_least("trainer.swaps", self.swaps, 0)
        at_least("trainer.eval_every_epochs", self.eval_every_epochs, 1)
        at_least("trainer.val_prompts", self.val_prompts, 1)
        at_least("trainer.val_prompt_len", self.val_prompt_len, 1)
        at_least("trainer.val_max_new_tokens", self.val_max_new_tokens, 2)
        at_least("trainer.seed", self.seed, 0)

    def id_config(self) -> dict[str, Any]:
        """Return what determines the tuned model.

        Where a validation ends the training, that is also how it is validated.
        """
        by_validation = ("target_accuracy", "target_entropy", "target_ttr")
        config = id_config(self, "tuned")
        stops = {name: config.pop(name) for name in by_validation}
        stops = {name: value for name, value in stops.items() if value is not None}
        return config | stops | (id_config(self, "validation") if stops else {})


@dataclass
class TrainingConfig:
    """Everything that a training job reads of a run's config."""

    tuning: TuningConfig
    optimizer: dict[str, Any]
    """`_target_` (a class that takes parameters first) and its keyword arguments."""
    trainer: TrainerConfig
    hardware: HardwareConfig

    @property
    def uses_activation_cache(self) -> bool:
        """Whether the outputs of the frozen layers are computed once and stored."""
        trainer = self.trainer
        return self.tuning.is_late and trainer.activation_cache != "off" and not trainer.dropout

    def gathers_bfloat16(self, dtype: str) -> bool:
        """Return whether several processes all-gather weights of a dtype as bfloat16."""
        return dtype == "float32" and self.trainer.precision == "bfloat16"


def check_optimizer(optimizer: dict[str, Any]) -> None:
    """Refuse an optimizer config without a class, or with numbers that are none.

    Raises:
        UserError: the message names the field.
    """
    required(
        "optimizer._target_",
        optimizer.get("_target_"),
        "the optimizer's class",
        "optimizer=adam",
    )
    for name in ("lr", "weight_decay", "eps"):
        value = optimizer.get(name)
        if isinstance(value, str):
            raise UserError(
                "is not a number", field=f"optimizer.{name}", value=value, valid="0 or more"
            )
        at_least(f"optimizer.{name}", value, 0)
