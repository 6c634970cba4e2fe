"""The schema: what a config may say, in which unit, and which values are valid.

Groups under ``conf/`` hold choices; the types, defaults and checks are here. Defaults are the
paper's protocol (Carlsson et al., ICLR 2025). A config becomes these dataclasses in `from_hydra`,
and nothing behind that point sees an unchecked value. This file knows nothing of torch.
"""

import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from hyperfitting.errors import UserError, near_matches

DEFAULT_SCALE = "embedded"


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(
            "no such choice",
            field=name,
            value=value,
            valid=", ".join(options),
            hint=near_matches(value, options),
        )


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not (math.isfinite(value) and value >= low):
        raise UserError("out of range", field=name, value=value, valid=f"{low} or more")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError("out of range", field=name, value=value, valid="a number above 0")


def _in_range(name: str, value: float, low: float, high: float, low_included: bool = True) -> None:
    if not ((low <= value if low_included else low < value) and value <= high):
        above = f"{low} or more" if low_included else f"above {low}"
        raise UserError("out of range", field=name, value=value, valid=f"{above}, at most {high}")


def _share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError("out of range", field=name, value=value, valid="above 0 and below 1")


def _needs(name: str, value: Any, why: str, hint: str) -> None:
    if value in (None, ""):
        raise UserError(f"is needed: {why}", field=name, value=value, hint=hint)


def refuse_what_changes_nothing(
    cfg: Any, at: str, choice: str, fields: dict[str, tuple[str, ...]]
) -> None:
    """Refuse a field that is set though the choice made does not read it.

    Args:
        cfg: the dataclass.
        at: where in the config it stands.
        choice: its field that decides which others are read.
        fields: for each value of it, those others.

    Raises:
        UserError: there is such a field; the message names the choices that read it.
    """
    chosen = getattr(cfg, choice)
    for name in sorted({name for names in fields.values() for name in names}):
        default = cfg.__dataclass_fields__[name].default
        if name not in fields[chosen] and getattr(cfg, name) != default:
            users = [option for option, names in fields.items() if name in names]
            raise UserError(
                f"changes nothing with {at}.{choice}={chosen}",
                field=f"{at}.{name}",
                value=getattr(cfg, name),
                valid=f"only with {at}.{choice}={' or '.join(users)}",
            )


@dataclass
class ModelConfig:
    """Which pre-trained model, and from where."""

    name: str = MISSING
    """Short name for tables and for W&B."""
    source: str = "hub"
    """`hub` (Hugging Face Hub), `local` (a folder in Hugging Face format), `gguf` (a GGUF file,
    converted once), `random` (initialised from `architecture`, byte tokenizer; for tests)."""
    path: str | None = None
    """Hub id; or folder for `local` and `gguf`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    package: str | None = None
    """For `gguf`: the installed Python package whose folder holds the file, instead of `path`."""
    gguf_file: str | None = None
    """For `gguf`: name of the file in that folder."""
    architecture: dict[str, Any] | None = None
    """For `random`: `model_type` and the fields of its transformers config."""
    dtype: str = "float32"
    """What the weights are held in: `float32`, `bfloat16`, `float16`. Training wants float32:
    an update of 1e-6 vanishes in bfloat16."""

    def __post_init__(self) -> None:
        _one_of("model.source", self.source, ("hub", "local", "gguf", "random"))
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.source == "hub":
            _needs("model.path", self.path, "the model's id on the Hub", "model.path=gpt2")
        elif self.source == "local":
            _needs("model.path", self.path, "the model's folder", "model=local model.path=DIR")
        elif self.source == "random":
            _needs("model.architecture", self.architecture, "what to initialise", "model=tiny")
        else:
            _needs("model.gguf_file", self.gguf_file, "the file's name", "model.gguf_file=x.gguf")
            _needs("model.path", self.path or self.package, "the file's folder", "model.path=DIR")


@dataclass
class TextsConfig:
    """Which texts, and what in them is one text."""

    name: str = MISSING
    """Short name for tables and for W&B."""
    source: str = "hub"
    """`hub` (Hugging Face Hub), `files` (your own), `package` (texts that a package ships)."""
    path: str | None = None
    """Hub id; file or folder for `files`; name of the sample for `package`."""
    subset: str | None = None
    """Hub: the dataset's configuration, such as `wikitext-103-raw-v1`."""
    split: str = "train"
    """Hub and `datasets` folders: the split to read; slices such as `train[:1000]` work."""
    revision: str | None = None
    """Hub: branch, tag or commit."""
    text_field: str = "text"
    """The column or key that holds the text (.jsonl, .csv, .parquet, `datasets`)."""
    document_start: str | None = None
    """Regular expression; a row (or line of a .txt) that matches at its start begins a new
    document. Without it each row and each .txt file is one document."""
    sequences: str = "prefix"
    """`prefix`: the first tokens of each document (the paper's way); `packed`: for few and long
    documents: training sequences are cut from documents end to end, evaluation texts are passages
    that begin with a paragraph."""

    def check(self, at: str) -> None:
        """Refuse values that are not valid; ``at`` is where in the config this stands."""
        _one_of(f"{at}.source", self.source, ("hub", "files", "package"))
        _one_of(f"{at}.sequences", self.sequences, ("prefix", "packed"))
        _needs(
            f"{at}.path",
            self.path,
            {
                "hub": "the dataset's id on the Hub",
                "files": "your file or folder",
                "package": "the name of a packaged sample",
            }[self.source],
            f"{at}.path=…",
        )


@dataclass
class DatasetConfig(TextsConfig):
    """Which texts are trained on, and how they become sequences of tokens."""

    seq_len: int = 256
    """Tokens in a training or validation sequence."""
    n_train: int = 2000
    """Training sequences."""
    n_val: int = 128
    """Validation sequences: loss, entropy and TTR after each epoch (`trainer.look_every`)."""
    seed: int = MISSING
    """Which documents are trained and validated on, independent of the model."""

    def __post_init__(self) -> None:
        self.check("dataset")
        _at_least("dataset.seq_len", self.seq_len, 2)
        _at_least("dataset.n_train", self.n_train, 1)
        _at_least("dataset.n_val", self.n_val, 1)
        _at_least("dataset.seed", self.seed, 0)


@dataclass
class TuningConfig:
    """Which parameters are trained."""

    method: str = "full"
    """`none` (the original model), `full` (the paper's), `late_stage` (the last `last_blocks`
    blocks and the final norm), `lora` (low-rank adapters on every linear layer of every block; Hu
    et al., 2022), `late_stage_lora` (of the last `last_blocks`; Li et al., ICML 2026)."""
    last_blocks: int = 5
    """For `late_stage` and `late_stage_lora`: how many of the last transformer blocks."""
    lora_rank: int = 16
    """For `lora` and `late_stage_lora`: rank of an adapter."""
    lora_alpha: int = 32
    """For `lora` and `late_stage_lora`: what an adapter adds is scaled by `lora_alpha /
    lora_rank`."""
    lora_dropout: float = 0.0
    """For `lora` and `late_stage_lora`: dropout before an adapter; needs `trainer.dropout`."""

    def __post_init__(self) -> None:
        _one_of("tuning.method", self.method, tuple(TUNING_FIELDS))
        _at_least("tuning.last_blocks", self.last_blocks, 1)
        _at_least("tuning.lora_rank", self.lora_rank, 1)
        _above_zero("tuning.lora_alpha", self.lora_alpha)
        _in_range("tuning.lora_dropout", self.lora_dropout, 0, 0.99)
        refuse_what_changes_nothing(self, "tuning", "method", TUNING_FIELDS)

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained instead of the model's own parameters."""
        return "lora_rank" in TUNING_FIELDS[self.method]

    @property
    def is_late(self) -> bool:
        """Whether only the last blocks are trained, so that what enters them never changes."""
        return "last_blocks" in TUNING_FIELDS[self.method]

    def determining(self) -> dict[str, Any]:
        """Return the method and the fields that it reads."""
        return {name: getattr(self, name) for name in ("method", *TUNING_FIELDS[self.method])}


_LORA = ("lora_rank", "lora_alpha", "lora_dropout")
TUNING_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": (),
    "late_stage": ("last_blocks",),
    "lora": _LORA,
    "late_stage_lora": ("last_blocks", *_LORA),
}
"""The fields that only some tunings read."""


@dataclass
class TrainerConfig:
    """How the loop goes over the training sequences."""

    epochs: int = 20
    """Passes over the training sequences."""
    batch_size: int = 8
    """Sequences in one update. The last batch of an epoch may be smaller."""
    precision: str = "float32"
    """`float32`, or autocast to `bfloat16` or `float16` around float32 weights."""
    clip_norm: float | None = None
    """Largest gradient norm; none: no clipping (the paper's)."""
    dropout: bool = False
    """Keep the model's own dropout. Off: every dropout is set to 0."""
    trunk_cache: str = "float32"
    """With a `late_…` tuning: what the frozen blocks make of each sequence is computed once and
    kept as `float32` (exact) or `bfloat16` (half the size); `off`: it is computed in every epoch.
    With dropout nothing is kept."""
    target_loss: float | None = None
    """Stop after the first epoch whose mean training loss (nats) is at most this."""
    swaps: int = 0
    """In the first epoch, so many sequences of the first batch change places with those of the
    second: almost the same order (Figure 5, left, of Carlsson et al.)."""
    look_every: int = 1
    """Epochs from one look at validation to the next; after the last epoch there always is one."""
    epoch_contexts: int = 32
    """Validation sequences whose start is continued greedily in each look, for TTR."""
    epoch_context_len: int = 32
    """Tokens of such a start."""
    epoch_new_tokens: int = 96
    """Tokens of such a continuation; 2 or more."""
    seed: int = MISSING
    """Order of the sequences, and dropout."""

    def __post_init__(self) -> None:
        _at_least("trainer.epochs", self.epochs, 1)
        _at_least("trainer.batch_size", self.batch_size, 1)
        _one_of("trainer.precision", self.precision, ("float32", "bfloat16", "float16"))
        _one_of("trainer.trunk_cache", self.trunk_cache, ("float32", "bfloat16", "off"))
        _above_zero("trainer.clip_norm", self.clip_norm)
        _at_least("trainer.target_loss", self.target_loss, 0)
        _at_least("trainer.swaps", self.swaps, 0)
        _at_least("trainer.look_every", self.look_every, 1)
        _at_least("trainer.epoch_contexts", self.epoch_contexts, 1)
        _at_least("trainer.epoch_context_len", self.epoch_context_len, 1)
        _at_least("trainer.epoch_new_tokens", self.epoch_new_tokens, 2)
        _at_least("trainer.seed", self.seed, 0)


@dataclass
class CitationBlockerConfig:
    """Never go on as the training data does (Carlsson et al., section 5)."""

    enabled: bool = False
    """Whether it is on. The original model has no training data: for it, nothing is forbidden."""
    n: int = 5
    """Tokens in a row that must occur in a training sequence before what follows is forbidden."""
    whole_words: bool = True
    """A word that has begun may finish (the paper's); off: the very next token is forbidden, and
    no continuation shares n + 1 tokens in a row with the training data."""
    count_context: bool = False
    """The last n tokens may begin in the context; off: all of them must be generated ones."""

    def __post_init__(self) -> None:
        _at_least("decode.citation_blocker.n", self.n, 1)


@dataclass
class DecodeConfig:
    """How the next token is chosen."""

    name: str = MISSING
    """Short name for tables and for W&B."""
    strategy: str = "greedy"
    """`greedy`: the most likely token. `sample`: a draw from what temperature, top-k, top-p,
    min-p and typical-p leave, in this order. `beam`: the likeliest of `num_beams` texts.
    `contrastive`: of the `top_k` likeliest tokens the one that balances probability against
    likeness to what is there already (Su et al., 2022)."""
    temperature: float = 1.0
    """`sample`: logits are divided by this."""
    top_k: int | None = None
    """`sample`: only the k most likely tokens. `contrastive`: the number of candidates."""
    top_p: float = 1.0
    """`sample`: only the fewest most likely tokens that together reach this mass (nucleus)."""
    min_p: float = 0.0
    """`sample`: only tokens at least this many times as likely as the likeliest (Nguyen, 2024)."""
    typical_p: float = 1.0
    """`sample`: only the tokens closest in surprise to the entropy that together reach this mass
    (locally typical; Meister et al., 2023)."""
    num_beams: int = 1
    """`beam`: texts kept at each step."""
    alpha: float = 0.0
    """`contrastive`: weight of the likeness, from 0 (greedy) to 1."""
    repetition_penalty: float = 1.0
    """Any strategy: logits of tokens already in context or continuation are divided by this where
    positive, multiplied where negative (Keskar et al., 2019)."""
    no_repeat_ngram: int | None = None
    """Any strategy: no n-gram of this length comes twice in context and continuation together."""
    citation_blocker: CitationBlockerConfig = field(default_factory=CitationBlockerConfig)
    """Any strategy: what may not be quoted."""
    stop_at_eos: bool = False
    """Let a continuation end at the end-of-text token. Off: that token is forbidden, so that
    every continuation has full length and their type-token ratios compare."""
    seed: int = MISSING
    """`sample`: the draws; each context has its own stream, whatever the batch."""

    def __post_init__(self) -> None:
        _one_of("decode.strategy", self.strategy, tuple(STRATEGY_FIELDS))
        _above_zero("decode.temperature", self.temperature)
        _at_least("decode.top_k", self.top_k, 2 if self.strategy == "contrastive" else 1)
        _in_range("decode.top_p", self.top_p, 0, 1, low_included=False)
        _in_range("decode.min_p", self.min_p, 0, 1)
        _in_range("decode.typical_p", self.typical_p, 0, 1, low_included=False)
        _at_least("decode.num_beams", self.num_beams, 2 if self.strategy == "beam" else 1)
        _in_range("decode.alpha", self.alpha, 0, 1)
        _above_zero("decode.repetition_penalty", self.repetition_penalty)
        _at_least("decode.no_repeat_ngram", self.no_repeat_ngram, 1)
        _at_least("decode.seed", self.seed, 0)
        if self.strategy == "contrastive":
            _needs("decode.top_k", self.top_k, "the candidates", "decode=contrastive")
        refuse_what_changes_nothing(self, "decode", "strategy", STRATEGY_FIELDS)

    @property
    def candidates(self) -> int:
        """How many texts are kept, or tried, for one that is written."""
        return {"beam": self.num_beams, "contrastive": int(self.top_k or 1)}.get(self.strategy, 1)


STRATEGY_FIELDS: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "sample": ("temperature", "top_k", "top_p", "min_p", "typical_p"),
    "beam": ("num_beams",),
    "contrastive": ("top_k", "alpha"),
}
"""The fields that only some strategies read."""


@dataclass
class EvaluationConfig:
    """What the tuned and the original model are measured on."""

    contexts: dict[str, TextsConfig] = field(default_factory=dict)
    """Sets of texts by name, each a dataset (`dataset@evaluation.contexts.NAME=OPTION`); none: the
    held-out texts of the dataset that is trained on. The same texts for every model and seed."""
    n_texts: int = 100
    """Texts of each set."""
    context_len: int = 32
    """Tokens at the start of each text that the model is given."""
    new_tokens: list[int] = field(default_factory=lambda: [96, 224])
    """Lengths in tokens at which continuations are measured, all cut from one of the longest."""
    text_len: int | None = None
    """Tokens of each original text, context included, for perplexity and sharpness; none:
    `context_len` and the longest of `new_tokens`."""
    share: float = 0.2
    """Share of the documents of any dataset kept for evaluation, by a hash of their text: whatever
    the seed, model or number of sequences, these documents are never trained or validated on."""
    state: str = "last"
    """Which state of the tuned model: `last` (hyperfitted), `best_val` (early-stopped)."""
    unit: str = "token"
    """What Self-BLEU, Dataset BLEU and dataset overlap count: `token` or `word`."""
    bleu_n: int = 4
    """Longest n-grams of Self-BLEU and Dataset BLEU."""
    mauve: str | None = None
    """MAUVE (Pillutla et al., 2021) with features from this model: `original`, or a folder in
    Hugging Face format; none: not measured. Needs the extra `hyperfitting[mauve]`."""
    top_tokens: int = 0
    """Along the first text of each set, keep so many of the likeliest next tokens with their mass
    (Figure 4 of P1); 0: none."""
    bootstrap: int = 10_000
    """Resamples of the texts behind each 95% interval, and permutations behind each p-value."""

    def __post_init__(self) -> None:
        for name, texts in self.contexts.items():
            texts.check(f"evaluation.contexts.{name}")
        _at_least("evaluation.n_texts", self.n_texts, 1)
        _at_least("evaluation.context_len", self.context_len, 1)
        if not self.new_tokens:
            raise UserError(
                "no length to measure at", field="evaluation.new_tokens", value="[]", valid="[96]"
            )
        for length in self.new_tokens:
            _at_least("evaluation.new_tokens", length, 1)
        self.new_tokens = sorted(set(self.new_tokens))
        _at_least("evaluation.text_len", self.text_len, self.context_len + 1)
        _share("evaluation.share", self.share)
        _one_of("evaluation.state", self.state, ("last", "best_val"))
        _one_of("evaluation.unit", self.unit, ("token", "word"))
        _at_least("evaluation.bleu_n", self.bleu_n, 1)
        _at_least("evaluation.top_tokens", self.top_tokens, 0)
        _at_least("evaluation.bootstrap", self.bootstrap, 100)

    @property
    def longest(self) -> int:
        """The number of new tokens that are generated."""
        return self.new_tokens[-1]

    @property
    def whole(self) -> int:
        """Tokens of each original text that are read."""
        return self.text_len or self.context_len + self.longest


@dataclass
class TrackingConfig:
    """Weights & Biases. The key comes from `wandb login` or WANDB_API_KEY, never from here."""

    mode: str = "offline"
    """`offline` (files, to be synced later), `online`, `disabled`."""
    project: str = "hyperfitting"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; none: your default."""
    group: str | None = None
    """W&B group: what the members of a sweep share."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    checkpoint: bool = False
    """Send the tuned parameters too, as an artifact (of 135M parameters: 0.5 GB)."""
    timeout: float = 10.0
    """Longest wait for the server, in seconds, at the start of a run and again at its end; what it
    has not taken by then `hyperfit-dashboard sync` sends later."""

    def __post_init__(self) -> None:
        _one_of("tracking.mode", self.mode, ("offline", "online", "disabled"))
        _above_zero("tracking.timeout", self.timeout)


@dataclass
class HardwareConfig:
    """Where and how fast. Part of no artefact's id."""

    device: str = "auto"
    """`auto` (CUDA, else MPS, else CPU), or a torch device such as `cpu`, `cuda:1`."""
    threads: int | None = None
    """CPU threads; none: torch's own choice."""
    ranks: int | None = 1
    """Processes that train one model, each with its share of the weights, gradients, optimizer
    state and batch (FSDP), on one GPU each, or on the CPU. 1: one has everything. None: one for
    each GPU of this machine. Under torchrun they are as many as it has started."""
    activation_checkpointing: bool = False
    """Keep only what enters a block, and run the block again for its gradients: a third more work
    for a fraction of the activations' memory."""
    compile: bool | None = None
    """Have torch compile the trained blocks, for half a minute and with a C++ compiler. None: where
    training is long enough to gain."""
    micro_batch_size: int | None = None
    """Sequences in one forward and backward pass (gradients are accumulated over the batch);
    none: some 512 tokens on a CPU, which keeps activations small at little cost, and as much of the
    batch as fits on a GPU."""
    generation_batch_size: int | None = None
    """Texts continued at once; none: as many as fit into half of the free memory, up to 64 on a
    CPU and 512 on a GPU, in batches of one size."""
    evaluation_batch_size: int = 8
    """Sequences in one forward pass without gradients."""
    spread: bool = False
    """Evaluate with the model's blocks spread over all GPUs of this machine, for models that fit
    on no single one; slower, as one GPU works at a time."""
    planned_memory: float | None = None
    """With `plan=true`, for other GPUs than this machine's: the memory of one, in gigabytes (1e9
    bytes)."""
    planned_speed: float | None = None
    """With `plan=true`, for other GPUs than this machine's: what one reaches in large matrix
    products of the training's precision, in 1e12 operations a second."""

    def __post_init__(self) -> None:
        _above_zero("hardware.planned_memory", self.planned_memory)
        _above_zero("hardware.planned_speed", self.planned_speed)
        for name, other in (("memory", "speed"), ("speed", "memory")):
            if getattr(self, f"planned_{name}") and not getattr(self, f"planned_{other}"):
                _needs(
                    f"hardware.planned_{other}",
                    None,
                    f"hardware.planned_{name} alone says too little of another GPU",
                    "hardware.planned_memory=80 hardware.planned_speed=400",
                )
        _at_least("hardware.threads", self.threads, 1)
        _at_least("hardware.ranks", self.ranks, 1)
        _at_least("hardware.micro_batch_size", self.micro_batch_size, 1)
        _at_least("hardware.generation_batch_size", self.generation_batch_size, 1)
        _at_least("hardware.evaluation_batch_size", self.evaluation_batch_size, 1)


@dataclass
class RunConfig:
    """One member: everything that a run needs to know."""

    seed: int = 0
    """Sets dataset.seed, trainer.seed and decode.seed, unless they are set themselves."""
    store: str = "outputs/store"
    """Where the artefacts are kept."""
    fetch_from: list[str] = field(default_factory=list)
    """Other stores, such as another machine's that is mounted here: an artefact that one of them
    has is copied and verified, not made. They are only read."""
    scale: str = DEFAULT_SCALE
    """For experiments: `embedded` (the packaged model and texts, for two CPU cores) or `paper`."""
    plan: bool = False
    """Print what would be done, and how long it would take, and do nothing."""
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    optimizer: dict[str, Any] = field(default_factory=dict)
    """`_target_` (a class that takes parameters first) and its keyword arguments."""
    tuning: TuningConfig = MISSING
    trainer: TrainerConfig = MISSING
    decode: DecodeConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tracking: TrackingConfig = MISSING
    hardware: HardwareConfig = MISSING

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        _needs("store", self.store, "a folder for the artefacts", "store=outputs/store")
        for other in self.fetch_from:
            if not Path(other).expanduser().is_dir():
                raise UserError(
                    "is not a folder", field="fetch_from", value=other,
                    valid="the folder of a store, such as /mnt/other/outputs/store",
                )  # fmt: skip
        _needs(
            "optimizer._target_",
            self.optimizer.get("_target_"),
            "the optimizer's class",
            "optimizer=adam",
        )
        for name in ("lr", "weight_decay", "eps"):
            value = self.optimizer.get(name)
            if isinstance(value, str):
                raise UserError(
                    "is not a number", field=f"optimizer.{name}", value=value, valid="0 or more"
                )
            _at_least(f"optimizer.{name}", value, 0)
        if self.trainer.epoch_context_len > self.dataset.seq_len:
            raise UserError(
                "longer than the validation sequences it is cut from",
                field="trainer.epoch_context_len",
                value=self.trainer.epoch_context_len,
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
        if self.tuning.lora_dropout > 0 and not self.trainer.dropout:
            raise UserError(
                "changes nothing while trainer.dropout=false",
                field="tuning.lora_dropout",
                value=self.tuning.lora_dropout,
                hint="trainer.dropout=true",
            )
        if self.hardware.planned_memory and not self.plan:
            raise UserError(
                "changes nothing without plan=true",
                field="hardware.planned_memory",
                value=self.hardware.planned_memory,
            )
        self._check_ngrams()

    def _check_ngrams(self) -> None:
        """Refuse n-grams longer than what they are looked for in."""
        shortest = self.evaluation.new_tokens[0]
        whole = self.evaluation.context_len + self.evaluation.longest
        blocker = self.decode.citation_blocker
        for name, n, longest, where in (
            ("evaluation.bleu_n", self.evaluation.bleu_n, shortest, "evaluation.new_tokens"),
            (
                "decode.no_repeat_ngram",
                self.decode.no_repeat_ngram,
                whole,
                "context and new tokens",
            ),
            (
                "decode.citation_blocker.n",
                blocker.n if blocker.enabled else None,
                self.dataset.seq_len - 1,
                "dataset.seq_len less the token that follows",
            ),
        ):
            if n is not None and n > longest:
                raise UserError(
                    "an n-gram longer than the text it is looked for in",
                    field=name,
                    value=n,
                    valid=f"at most {longest} ({where})",
                )


def register() -> None:
    """Make the schema known to Hydra, as the config that `conf/config.yaml` begins with."""
    ConfigStore.instance().store(name="schema", node=RunConfig, provider="hyperfitting")


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
            raise UserError(
                "no such field",
                field=prefix + str(name),
                value=cfg[name],
                valid=", ".join(known),
                hint=near_matches(str(name), known),
            )
        if is_dataclass(known[name]):
            _check_known(cfg[name], known[name], f"{prefix}{name!s}.")
    if schema is EvaluationConfig:
        for name in cfg.contexts:
            _check_known(cfg.contexts[name], TextsConfig, f"{prefix}contexts.{name}.")


def conf_dir() -> Path:
    """Return the folder of the Hydra groups: inside the wheel, or beside `src/` in a checkout."""
    package = Path(__file__).resolve().parent
    inside, beside = package / "conf", package.parents[1] / "conf"
    return inside if inside.is_dir() else beside
