"""`RunConfig`: the config groups together, the checks between them, and the way from Hydra.

Each group's dataclass lives beside the code that it configures (`models/config.py`,
`training/config.py`, …); defaults are the paper's protocol (Carlsson et al., ICLR 2025). A composed
config becomes these dataclasses in `from_hydra`, which checks every value. (Long, as all checks
between groups are here.)
"""

from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from hyperfitting.data.config import DatasetConfig, TextsConfig, register_resolvers
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.errors import UserError, no_such
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.fields import RECORD, RUNTIME, at_least, required, setting
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.models.config import ModelConfig, TuningConfig
from hyperfitting.record.chat import CHAT
from hyperfitting.runtime.config import HardwareConfig, TrackingConfig
from hyperfitting.training.config import TrainerConfig, TrainingConfig, check_optimizer

DEFAULT_SCALE = "embedded"


@dataclass
class RunConfig:
    """Everything that a run needs to know."""

    seed: int = setting(0, enters=RECORD)
    """Sets dataset.seed, trainer.seed and decode.seed, unless they are set themselves."""
    store: str = setting("outputs/store", enters=RUNTIME)
    """Folder of the artifacts."""
    remote_stores: list[str] = setting(factory=list, enters=RUNTIME)
    """Other stores, such as another machine's that is mounted here: an artifact found in one of
    them is copied and verified instead of built. They are only read."""
    scale: str = setting(DEFAULT_SCALE, enters=RUNTIME)
    """For experiments: `embedded` (the packaged model and texts, for two CPU cores) or `paper`."""
    plan: bool = setting(False, enters=RUNTIME)
    """Print what would be built, with time and memory, and build nothing."""
    model: ModelConfig = setting(MISSING, enters=RECORD)
    dataset: DatasetConfig = setting(MISSING, enters=RECORD)
    optimizer: dict[str, Any] = setting(factory=dict, enters="tuned")
    """`_target_` (a class that takes parameters first) and its keyword arguments."""
    tuning: TuningConfig = setting(MISSING, enters=RECORD)
    trainer: TrainerConfig = setting(MISSING, enters=RECORD)
    intervention: InterventionConfig = setting(MISSING, enters=RECORD)
    decode: DecodeConfig = setting(MISSING, enters=RECORD)
    evaluation: EvaluationConfig = setting(MISSING, enters=RECORD)
    mechanism: MechanismConfig = setting(factory=MechanismConfig, enters=RECORD)
    tracking: TrackingConfig = setting(MISSING, enters=RUNTIME)
    hardware: HardwareConfig = setting(MISSING, enters=RUNTIME)

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        required("store", self.store, "a folder for the artifacts", "store=outputs/store")
        for other in self.remote_stores:
            if not Path(other).expanduser().is_dir():
                raise UserError(
                    "is not a folder",
                    field="remote_stores",
                    value=other,
                    valid="the folder of a store, such as /mnt/other/outputs/store",
                )
        check_optimizer(self.optimizer)
        self._check_trainer()
        self._check_lost_updates()
        self._check_needs_tuned()
        self._check_patching()
        self._check_mechanism()
        self._check_modality()
        self._check_image_lengths()
        self._check_chat()
        self._check_ngram_lengths()
        if self.hardware.plan_gpu_memory_gb and not self.plan:
            raise UserError(
                "changes nothing without plan=true",
                field="hardware.plan_gpu_memory_gb",
                value=self.hardware.plan_gpu_memory_gb,
            )

    @property
    def training(self) -> TrainingConfig:
        """The groups that a training job reads."""
        return TrainingConfig(self.tuning, self.optimizer, self.trainer, self.hardware)

    @property
    def evaluation_datasets(self) -> dict[str, TextsConfig]:
        """The evaluation datasets by name: those given, else the one that is trained on."""
        return self.evaluation.datasets or {self.dataset.name: self.dataset}

    def _check_trainer(self) -> None:
        """Refuse trainer settings that do not fit the dataset or the tuning."""
        if self.trainer.val_prompt_len > self.dataset.seq_len:
            raise UserError(
                "longer than the validation sequences it is cut from",
                field="trainer.val_prompt_len",
                value=self.trainer.val_prompt_len,
                valid=f"at most dataset.seq_len={self.dataset.seq_len}",
            )
        second = min(self.trainer.batch_size, self.dataset.n_train - self.trainer.batch_size)
        if self.trainer.swaps > max(0, second):
            raise UserError(
                "more than the second batch holds",
                field="trainer.swaps",
                value=self.trainer.swaps,
                valid=f"0 to {max(0, second)} (by trainer.batch_size and dataset.n_train)",
            )
        if self.trainer.precision == "tf32" and self.model.dtype != "float32":
            raise UserError(
                f"changes nothing for weights in {self.model.dtype}",
                field="trainer.precision",
                value=self.trainer.precision,
                valid="only with model.dtype=float32",
            )
        if self.tuning.lora_dropout > 0 and not self.trainer.dropout:
            raise UserError(
                "changes nothing while trainer.dropout=false",
                field="tuning.lora_dropout",
                value=self.tuning.lora_dropout,
                hint="trainer.dropout=true",
            )

    def _check_mechanism(self) -> None:
        """Refuse comparisons of no tokens."""
        skipped = self.mechanism.skip_tokens
        if "geometry" in self.mechanism.measures and skipped >= self.evaluation.context_len:
            raise UserError(
                "would leave nothing of a text whose continuation is empty",
                field="mechanism.skip_tokens",
                value=skipped,
                valid=f"below evaluation.context_len={self.evaluation.context_len}",
            )

    def _check_lost_updates(self) -> None:
        """Refuse to train weights whose updates are far below the spacing of their dtype."""
        trains_weights = self.tuning.method != "none" and not self.tuning.is_lora
        is_rounded = bool(self.optimizer.get("bf16_stochastic_round"))
        if self.model.dtype == "float32" or not trains_weights or is_rounded:
            return
        if not self.trainer.allow_lost_updates:
            raise UserError(
                f"weights in {self.model.dtype} lose updates far below their spacing: with Adam at "
                "1e-6 they never change",
                field="model.dtype",
                value=self.model.dtype,
                valid="float32 (with trainer.precision=bfloat16 for speed), or stochastic rounding",
                hint="model.dtype=float32, or where that does not fit optimizer=adam_bf16 or "
                "adam_8bit; trainer.allow_lost_updates=true trains anyway",
            )

    def _check_patching(self) -> None:
        """Refuse activation patching of texts that are sampled."""
        patched = self.evaluation.patch_block
        if patched is not None and self.decode.strategy != "greedy":
            raise UserError(
                f"the base model decodes greedily after a patch, and decode.strategy="
                f"{self.decode.strategy}",
                field="evaluation.patch_block",
                value=patched,
                valid="only with decode.strategy=greedy",
            )

    def _check_needs_tuned(self) -> None:
        """Refuse what compares, patches or replaces a tuned model where there is none."""
        if self.tuning.method != "none":
            return
        for field, value, unused in (
            ("mechanism.measures", self.mechanism.measures, []),
            ("evaluation.patch_block", self.evaluation.patch_block, None),
            ("intervention.method", self.intervention.method, "none"),
            ("decode.control.method", self.decode.control.method, "none"),
        ):
            if value != unused:
                raise UserError(
                    "needs a tuned model, and tuning=none has none",
                    field=field,
                    value=value,
                    hint="tuning=full, or another tuning",
                )

    def _check_modality(self) -> None:
        """Refuse what is for models of the other modality, text or images."""
        of_text = {
            "dataset.chat": self.dataset.chat,
            "evaluation.downstream": self.evaluation.downstream,
            "evaluation.mauve": self.evaluation.mauve,
            "evaluation.chat": self.evaluation.chat,
            "mechanism.measures": [name for name in self.mechanism.measures if name == "lens"],
        }
        of_images = {"evaluation.fid_weights": self.evaluation.fid_weights}
        is_text = self.dataset.image is None
        modalities = "images, not of text" if is_text else "text, not of images"
        for field, value in (of_images if is_text else of_text).items():
            if value:
                raise UserError(
                    f"is for models of {modalities}",
                    field=field,
                    value=value,
                    hint="another model and dataset",
                )

    def _check_image_lengths(self) -> None:
        """Refuse what needs whole images, or a position for each token."""
        if self.dataset.image is None:
            return
        if self.evaluation.fid_weights and self.evaluation.total_len != self.dataset.image.n_tokens:
            raise UserError(
                "needs whole images",
                field="evaluation.context_len + evaluation.max_new_tokens",
                value=self.evaluation.total_len,
                valid=f"{self.dataset.image.n_tokens} with evaluation.fid_weights",
            )
        measures, strategy = self.mechanism.measures, self.decode.strategy
        n_pixels = self.dataset.image.n_pixels  # and positions: SOS and all pixels are one more
        if max(self.evaluation.total_len, self.evaluation.reference_len) <= n_pixels:
            return
        for field, value in (
            ("mechanism.measures", [measure for measure in measures if measure != "weights"]),
            ("decode.strategy", [strategy] if strategy == "contrastive" else []),
        ):
            if value:
                raise UserError(
                    "feeds the model every token, and an image with SOS has one more than the "
                    "model has positions",
                    field=field,
                    value=", ".join(value),
                    valid=f"with at most {n_pixels} tokens of context and continuation",
                    hint="dataset.image.prepend_sos=false",
                )

    def _check_chat(self) -> None:
        """Refuse an evaluation dataset with the name of the answers to questions."""
        if self.evaluation.chat and CHAT in self.evaluation_datasets:
            raise UserError(
                "is the name that the answers to questions (evaluation.chat) have in tables",
                field="evaluation.datasets" if self.evaluation.datasets else "dataset.name",
                value=CHAT,
                valid="another name",
            )

    def _check_ngram_lengths(self) -> None:
        """Refuse n-grams longer than the text they are counted in."""
        blocker = self.decode.citation_blocker
        limits = (
            (
                "evaluation.bleu_n",
                self.evaluation.bleu_n,
                self.evaluation.max_new_tokens[0],
                "evaluation.max_new_tokens",
            ),
            (
                "decode.no_repeat_ngram_size",
                self.decode.no_repeat_ngram_size,
                self.evaluation.total_len,
                "context and new tokens",
            ),
            (
                "decode.citation_blocker.n",
                blocker.n if blocker.enabled else None,
                self.dataset.seq_len - 1,
                "dataset.seq_len less the token that follows",
            ),
        )
        for name, n, longest, where in limits:
            if n is not None and n > longest:
                raise UserError(
                    "an n-gram longer than the text it is counted in",
                    field=name,
                    value=n,
                    valid=f"at most {longest} ({where})",
                )


def register() -> None:
    """Register the schema with Hydra, as the config that `conf/config.yaml` begins with."""
    ConfigStore.instance().store(name="schema", node=RunConfig, provider="hyperfitting")
    register_resolvers()


def from_hydra(cfg: DictConfig) -> RunConfig:
    """Return the composed config as checked dataclasses.

    Raises:
        UserError: a value is missing or out of range; the message names its field.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        name = min(missing)
        raise UserError("must be set", field=name, value="???", hint=f"{name}=…")
    _check_known(cfg, RunConfig, "")
    return cast(RunConfig, OmegaConf.to_object(cfg))


def from_plain(values: dict[str, Any]) -> RunConfig:
    """Return the config that `dataclasses.asdict` was given."""
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(RunConfig, values)))


def _check_known(cfg: DictConfig, schema: type, prefix: str) -> None:
    """Refuse a field that Hydra's `+field=…` added and that would change nothing."""
    known = get_type_hints(schema)
    for name in cfg:
        if name not in known:
            raise no_such("field", prefix + str(name), str(name), known, value=str(cfg[name]))
        if is_dataclass(known[name]):
            _check_known(cfg[name], known[name], f"{prefix}{name!s}.")
    if schema is EvaluationConfig:
        for name in cfg.datasets:
            _check_known(cfg.datasets[name], TextsConfig, f"{prefix}datasets.{name}.")


def conf_dir() -> Path:
    """Return the folder of the Hydra groups: inside the wheel, or beside `src/` in a checkout."""
    package = Path(__file__).resolve().parent
    inside, beside = package / "conf", package.parents[1] / "conf"
    return inside if inside.is_dir() else beside
