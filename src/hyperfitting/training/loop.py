"""Hyperfitting itself: pass over a few sequences until the training loss is near zero.

Next-token loss on whole sequences, exact epochs in a seeded order, and after each epoch a look at
held-out sequences: loss, entropy, and the type-token ratio of greedy continuations (Figure 2 of
Carlsson et al.). Knows nothing of texts, tables, W&B or the terminal.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hyperfitting import preemption
from hyperfitting.config import DecodeConfig, HardwareConfig, RunConfig, TrainerConfig
from hyperfitting.data.corpus import Corpus
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.likelihood import measure
from hyperfitting.distributed import ALONE, Crew, whole
from hyperfitting.errors import UserError
from hyperfitting.metrics.diversity import rep_n, ttr
from hyperfitting.models import BaseModel
from hyperfitting.progress import Advance, Row
from hyperfitting.progress import Progress as ShowProgress
from hyperfitting.store import replacing, write_json
from hyperfitting.training.checkpoint import Checkpoint, Progress
from hyperfitting.training.learner import Learner, Rows
from hyperfitting.training.trunk import KeptIn, check_room, trunk_of

log = logging.getLogger(__name__)


_ROWS_TOGETHER = 32
"""Texts that each of several processes continues at once."""


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
