"""Hyperfitting itself: pass over a few sequences until the training loss is near zero.

Next-token loss on whole sequences, exact epochs in a seeded order, and after each epoch a look at
held-out sequences: loss, entropy, and the type-token ratio of greedy continuations (Figure 2 of
Carlsson et al.). Knows nothing of texts, tables, W&B or the terminal.
"""

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyperfitting import costs, models, parameters, preemption, products
from hyperfitting.config import DecodeConfig, HardwareConfig, RunConfig, TrainerConfig
from hyperfitting.data.corpus import Corpus
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.likelihood import measure
from hyperfitting.distributed import ALONE, Crew, gather_anew, whole
from hyperfitting.errors import UserError
from hyperfitting.forwards import running
from hyperfitting.metrics.diversity import rep_n, ttr
from hyperfitting.models import BaseModel
from hyperfitting.progress import Advance, Row
from hyperfitting.progress import Progress as ShowProgress
from hyperfitting.store import replacing, write_json
from hyperfitting.training.checkpoint import Checkpoint, Progress
from hyperfitting.training.compiled import COMPILER_ERRORS, Compiled, pays
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.trunk import KeptIn, Trunk, check_room, trunk_of

Rows = NDArray[np.int64]
log = logging.getLogger(__name__)


_ROWS_TOGETHER = 32
"""Texts that each of several processes continues at once."""


@dataclass
class Learner:
    """A model with the optimizer of its trained parameters."""

    model: PreTrainedModel
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainer: TrainerConfig
    micro_batch_size: int
    compiled: Compiled
    loss: NextTokenLoss
    crew: Crew
    linear: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    trunk: Trunk | None = None

    @classmethod
    def new(cls, cfg: RunConfig, base: BaseModel, crew: Crew = ALONE) -> "Learner":
        """Return the original model, ready to be tuned. Its trunk, if any, is not replaced yet.

        Of several processes each has its shards of it.

        Raises:
            UserError: the model, the tuning or the optimizer cannot be had as asked.
        """
        device = models.device(cfg.hardware)
        model = models.load(base, crew)
        trained = parameters.select_trainable(model, cfg.tuning, cfg.trainer.seed)
        if not cfg.trainer.dropout:
            parameters.no_dropout(model)
        if crew.size == 1:
            model.to(device)
        if cfg.hardware.activation_checkpointing:
            model.activation_checkpointing_enable()
        return cls(
            model,
            trained,
            build_optimizer(cfg.optimizer, list(trained.values())),
            torch.amp.GradScaler(device.type, enabled=cfg.trainer.precision == "float16"),
            cfg.trainer,
            costs.rows_in_a_pass(cfg, device.type),
            Compiled(model, on=pays(cfg, device, trained.values())),
            NextTokenLoss(model),
            crew,
            products.of(model, cfg.trainer.precision),
        )

    def update(self, tokens: Tensor, rows: Rows) -> float:
        """Take one step and return its mean next-token loss in nats.

        Args:
            tokens: (B, T) sequences.
            rows: (B,) where they stand among the training sequences.
        """
        tokens = tokens.to(self.model.device)
        while True:
            try:
                with running(self.linear), self.compiled.used():
                    return self._update(tokens, rows)
            except torch.OutOfMemoryError:
                if self.micro_batch_size == 1 or self.crew.size > 1:  # the others are further on
                    raise
                self.micro_batch_size = math.ceil(min(self.micro_batch_size, len(tokens)) / 2)
                log.warning(
                    "out of GPU memory: going on with hardware.micro_batch_size=%d",
                    self.micro_batch_size,
                )
            except COMPILER_ERRORS as error:
                if not self.compiled.on:
                    raise
                self.compiled.on = False
                log.warning("torch cannot compile this model here (%s): it runs as it is", error)

    def _update(self, tokens: Tensor, rows: Rows) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        predicted = tokens[:, 1:].numel()
        total = torch.zeros((), device=tokens.device)
        mine, counted = self.crew.share(np.arange(len(tokens)))
        for start in range(0, len(mine), self.micro_batch_size):
            part = mine[start : start + self.micro_batch_size]  # (b,)
            with self._trunk_of(rows[part]):
                with parameters.autocast(self.model, self.trainer.precision):
                    loss = self.loss(tokens[part], max(0, counted - start)) / predicted
                # FSDP takes the mean over processes; what is wanted is the sum
                self.scaler.scale(loss * self.crew.size).backward()
            total += loss.detach()
        self._sum_gradients()
        if self.trainer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(list(self.trained.values()), self.trainer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(self.crew.total(total))

    def _sum_gradients(self) -> None:
        """Do for parameters that every process has, as adapters are, what FSDP does for others."""
        for parameter in self.trained.values():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                parameter.grad = self.crew.total(parameter.grad) / self.crew.size

    def _trunk_of(self, rows: Rows) -> AbstractContextManager[None]:
        if self.trunk is None:
            return nullcontext()
        return self.trunk.replaced(self.trunk.of(rows, next(self.model.parameters())))

    def parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters as they are now."""
        return {name: p.detach() for name, p in self.trained.items()}

    def state(self) -> dict[str, Any]:
        """Return all that a resumed training needs of this one."""
        return {
            "parameters": self.parameters(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self._random(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from."""
        gather_anew(self.model)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])

    def _random(self) -> dict[str, Tensor]:
        """Return where the random numbers are that dropout draws."""
        found = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state()
        return found


def train(
    cfg: RunConfig,
    data: Corpus,
    base: BaseModel,
    work: Path,
    show: ShowProgress,
    on_row: Callable[[Row], None],
    kept_in: KeptIn,
    crew: Crew = ALONE,
) -> None:
    """Train, from the checkpoint in ``work`` if there is one, and leave the states there.

    Several processes (``crew``) call this alike; the first of them leaves the states.

    Raises:
        Preempted: this process was told to end; a checkpoint is written.
        UserError: training diverges, or what the config asks for cannot be had.
    """
    _check(cfg, base, crew)
    check_room(cfg, base, data.train.shape, kept_in)
    learner, checkpoint, done = Learner.new(cfg, base, crew), Checkpoint(work, crew), Progress()
    learner.trunk = trunk_of(cfg, learner.model, data.train, kept_in, show, crew)
    saved = checkpoint.load(learner.trained)
    if saved:
        done = saved["progress"]
        learner.restore(saved)
        for row in done.history:
            on_row(row)
    course = _Course(cfg, data, learner, checkpoint, done, work, on_row)
    with show("training", course.left(), "tokens") as advance, preemption.waits():
        while not course.is_over():
            row = course.epoch(advance)
            reached = row["train/loss"] <= (cfg.trainer.target_loss or -math.inf)
            last = reached or done.epoch == cfg.trainer.epochs
            if last or done.epoch % cfg.trainer.look_every == 0:
                row |= course.look(show)
            course.note(row)
            log.info("epoch %d of %d: %s", done.epoch, cfg.trainer.epochs, row)
            if last:
                break
            if checkpoint.is_due():
                checkpoint.save(done, learner.state())

    _save_parameters(work / "last.safetensors", learner)
    if crew.leads:
        write_json(work / "history.json", done.history)
    checkpoint.remove()


@dataclass
class _Course:
    """A training on its way."""

    cfg: RunConfig
    data: Corpus
    learner: Learner
    checkpoint: Checkpoint
    done: Progress
    work: Path
    on_row: Callable[[Row], None]

    @property
    def begun(self) -> int:
        """How many updates of an unfinished epoch are done; after a resume there may be some."""
        each = math.ceil(len(self.data.train) / self.cfg.trainer.batch_size)
        return self.done.step - self.done.epoch * each

    def is_over(self) -> bool:
        """Return whether all epochs are done."""
        return self.done.epoch >= self.cfg.trainer.epochs

    def left(self) -> int:
        """Return how many tokens it will still go over, at most."""
        n, length = self.data.train.shape
        rows = (self.cfg.trainer.epochs - self.done.epoch) * n
        return int((rows - self.begun * self.cfg.trainer.batch_size) * length)

    def note(self, row: Row) -> None:
        """Keep a row of the history, and tell of it."""
        self.done.history.append(row)
        self.on_row(row)

    def epoch(self, advance: Advance) -> Row:
        """Go over all sequences once, or over those that are left; return the epoch's row.

        Raises:
            Preempted: this process was told to end; a checkpoint is written.
            UserError: the loss is not finite.
        """
        learner, trainer, number, begun = (
            self.learner,
            self.cfg.trainer,
            self.done.epoch,
            self.begun,
        )
        history = self.done.history
        losses = [update["train/loss"] for update in history[len(history) - begun :]]
        learner.model.train()
        if begun == 0:
            torch.manual_seed(_dropout_seed(trainer.seed, number, learner.crew.rank))
        order = batches(len(self.data.train), number, trainer)
        for rows in itertools.islice(order, begun, None):
            batch = torch.as_tensor(self.data.train[rows], dtype=torch.long)  # (B, T)
            losses.append(loss := learner.update(batch, rows))
            self.done.step += 1
            if not math.isfinite(loss):
                raise self._diverged(f"the training loss became {loss}")
            self.note({"step": self.done.step, "train/loss": loss})
            advance(batch.numel(), epoch=number + 1, loss=loss)
            if (signum := learner.crew.agreed(preemption.asked())) is not None:
                self.checkpoint.save(self.done, learner.state())
                raise preemption.Preempted(signum)
        self.done.epoch = number + 1
        return {
            "epoch": number + 1,
            "step": self.done.step,
            "train/loss": float(np.mean(losses)),
        }

    def look(self, show: ShowProgress) -> Row:
        """Look at validation, and keep the parameters if they never were better.

        Raises:
            UserError: the model's numbers are not finite.
        """
        learner = self.learner
        try:
            row = look(
                learner.model, self.data, self.cfg.trainer, self.cfg.hardware, show, learner.crew
            )
        except FloatingPointError as error:
            self.done.epoch -= 1
            raise self._diverged(f"in validation, {error}") from error
        if row["val/loss"] < self.done.best_val:
            self.done.best_val = row["val/loss"]
            _save_parameters(self.work / "best_val.safetensors", learner)
        return row

    def _diverged(self, what: str) -> UserError:
        kept = self.checkpoint.files()
        where = f"an earlier state is kept in {kept[0]}" if kept else "no epoch was complete"
        return UserError(
            f"training diverged in epoch {self.done.epoch + 1}, update {self.done.step}: {what}; "
            f"{where}",
            hint="a lower optimizer.lr, trainer.clip_norm=1.0, or trainer.precision=float32",
        )


def _check(cfg: RunConfig, base: BaseModel, crew: Crew) -> None:
    trainer = cfg.trainer
    if crew.size > 1 and trainer.precision == "float16":
        raise UserError(
            "is for one process",
            field="trainer.precision",
            value=trainer.precision,
            valid="bfloat16 or float32, with hardware.ranks",
        )
    base.check_length(
        "trainer.epoch_context_len + trainer.epoch_new_tokens",
        trainer.epoch_context_len + trainer.epoch_new_tokens,
    )
    if base.dtype != "float32" and not cfg.optimizer.get("bf16_stochastic_round"):
        log.warning(
            "model.dtype=%s: updates much smaller than a weight are lost in it; better keep "
            "model.dtype=float32 and set trainer.precision=%s, or, where that does not fit, round "
            "stochastically (optimizer=adam_bf16 or adam_8bit)",
            base.dtype,
            base.dtype,
        )


def _dropout_seed(seed: int, epoch: int, rank: int) -> int:
    own = [rank] if rank else []
    return int(np.random.SeedSequence([seed, epoch, *own]).generate_state(1)[0])


def batches(n: int, epoch: int, trainer: TrainerConfig) -> Iterator[Rows]:
    """Yield which of ``n`` sequences a batch holds (B,): each once, in this epoch's order."""
    order = np.random.default_rng([trainer.seed, epoch]).permutation(n)
    if epoch == 0:
        here = np.arange(trainer.swaps)
        there = here + trainer.batch_size
        order[here], order[there] = order[there], order[here]
    for start in range(0, n, trainer.batch_size):
        yield order[start : start + trainer.batch_size]


def look(
    model: PreTrainedModel,
    data: Corpus,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    show: ShowProgress,
    crew: Crew = ALONE,
) -> Row:
    """Return validation loss and entropy, and the TTR and repetition of greedy continuations."""
    model.eval()
    contexts = data.val[: trainer.epoch_contexts, : trainer.epoch_context_len]
    texts, starts = crew.share(data.val)[0], crew.share(contexts)[0]
    with show("validating", texts.size, "tokens") as advance:
        found = measure(model, texts, hardware.evaluation_batch_size, advance)
    batch_size = hardware.generation_batch_size
    if crew.size > 1 and batch_size is None:  # free memory differs; the number of passes may not
        batch_size = min(len(starts), _ROWS_TOGETHER)
    with show("continuing", len(starts) * trainer.epoch_new_tokens, "tokens") as advance:
        made = continue_texts(
            model,
            starts,
            trainer.epoch_new_tokens,
            DecodeConfig(name="greedy", seed=0),
            batch_size,
            advance,
        )
    continuations = crew.gathered(np.array(made.tokens), len(contexts))
    loss, entropy = (
        crew.gathered(found[name], len(data.val)).mean() for name in ("loss", "entropy")
    )
    return {
        "val/loss": float(loss),
        "val/entropy": float(entropy),
        "gen/ttr": float(np.mean([ttr(tokens) for tokens in continuations.tolist()])),
        "gen/rep_2": float(np.mean([rep_n(tokens, 2) for tokens in continuations.tolist()])),
    }


def build_optimizer(
    config: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer that a config names.

    Raises:
        UserError: there is no such class, or it refuses its arguments.
    """
    package = str(config.get("_target_")).partition(".")[0]
    if package == "torchao" and importlib.util.find_spec(package) is None:
        raise UserError(
            "needs the package torchao, which is not installed",
            field="optimizer",
            value=config["_target_"],
            hint="pip install 'hyperfitting[low-memory]'",
        )
    try:
        optimizer: torch.optim.Optimizer = instantiate(config, parameters, _convert_="all")
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"cannot be built: {cause}",
            field="optimizer",
            value=config.get("_target_"),
            hint="see conf/optimizer/adam.yaml for a class and its arguments",
        ) from error
    return optimizer


def _save_parameters(path: Path, learner: Learner) -> None:
    """Write the trained parameters, which several processes bring together."""
    tensors = {}
    for name, parameter in learner.parameters().items():
        gathered = whole(parameter)
        if learner.crew.leads:
            tensors[name] = gathered.cpu().contiguous()
    if learner.crew.leads:
        with replacing(path) as beside:
            save_file(tensors, beside)
