"""The config group `intervention`: weights derived from the base and the tuned model's."""

from dataclasses import dataclass
from typing import Any

from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError
from hyperfitting.fields import (
    RECORD,
    at_least,
    id_config,
    in_range,
    one_of,
    refuse_unused,
    required,
    setting,
)

METHODS = ("none", "stitch", "interpolate", "task_vector", "truncate")
PARTS = ("embedding", "blocks", "attention", "mlp", "final_norm", "output")
_ID = "intervention"
_STITCH, _TASK_VECTOR = ("stitch",), ("task_vector",)


@dataclass
class InterventionConfig:
    """What takes the tuned model's place in the evaluation."""

    method: str = setting("none", enters=_ID)
    """`none`: the tuned model itself. `stitch`: some parts of the tuned model, the others of the
    base. `interpolate`: base + weight * (tuned - base). `task_vector`: tuned + scale * (other -
    base), with another tuning of the same base model (Ilharco et al., 2023). `truncate`: base +
    the difference of each matrix, truncated to a rank; vectors are the tuned model's."""
    parts: list[str] = setting(factory=lambda: ["blocks"], enters=_ID, read_by=_STITCH)
    """What is taken from the tuned model: `embedding` (all that is not in another part), `blocks`,
    the `attention` or the `mlp` of blocks (without the norms before them), `final_norm`, `output`
    (the output layer; where its weights are tied, the embedding too). Empty: nothing."""
    last_blocks: int | None = setting(None, enters=_ID, read_by=_STITCH)
    """Number of trailing blocks that `blocks`, `attention` and `mlp` mean; null: all blocks."""
    reverse: bool = setting(False, enters=_ID, read_by=_STITCH)
    """Take these parts from the base model and the others from the tuned one."""
    weight: float = setting(0.5, enters=_ID, read_by=("interpolate",))
    """0: the base model; 1: the tuned one; beyond 1: further in the same direction."""
    scale: float = setting(1.0, enters=_ID, read_by=_TASK_VECTOR)
    """Factor of the other tuning's difference from the base; negative: it is subtracted."""
    dataset: TextsConfig | None = setting(None, enters=RECORD, read_by=_TASK_VECTOR)
    """The other tuning: the same training on these texts (`dataset@intervention.dataset=OPTION`),
    with `dataset.n_train`, `dataset.seq_len` and the other settings of this run."""
    path: str | None = setting(None, enters=RECORD, read_by=_TASK_VECTOR)
    """The other tuning, instead of `dataset`: the folder that another run prints as `model`, such
    as outputs/store/tuned/ID."""
    rank: int = setting(8, enters=_ID, read_by=("truncate",))
    """Singular values that are kept of the difference of each matrix."""

    def __post_init__(self) -> None:
        one_of("intervention.method", self.method, METHODS)
        for part in self.parts:
            one_of("intervention.parts", part, PARTS)
        at_least("intervention.last_blocks", self.last_blocks, 1)
        in_range("intervention.weight", self.weight, -100, 100)
        in_range("intervention.scale", self.scale, -100, 100)
        at_least("intervention.rank", self.rank, 1)
        refuse_unused(self, "intervention", "method")
        if self.method == "stitch":
            self._check_last_blocks()
        if self.method == "task_vector":
            self._check_other()

    @property
    def is_on(self) -> bool:
        """Whether the tuned model is replaced."""
        return self.method != "none"

    def derived_dtype(self, dtype: str) -> str:
        """Return the dtype of the derived weights, for models of a dtype: float32 if computed."""
        return dtype if self.method in ("none", "stitch") else "float32"

    def id_config(self) -> dict[str, Any]:
        """Return the method and the fields that it reads."""
        return id_config(self, _ID, "method")

    def _check_last_blocks(self) -> None:
        if self.last_blocks is not None and not {"blocks", "attention", "mlp"} & set(self.parts):
            raise UserError(
                f"changes nothing with intervention.parts={self.parts}",
                field="intervention.last_blocks",
                value=self.last_blocks,
                valid="only with blocks, attention or mlp among intervention.parts",
            )

    def _check_other(self) -> None:
        if self.dataset is None:
            required(
                "intervention.path",
                self.path,
                "the other tuning",
                "dataset@intervention.dataset=shakespeare, or intervention.path=DIR",
            )
        elif self.path is not None:
            raise UserError(
                "changes nothing with intervention.dataset: the other tuning is one of the two",
                field="intervention.path",
                value=self.path,
                hint="dataset@intervention.dataset=null",
            )
        else:
            self.dataset.check("intervention.dataset")
