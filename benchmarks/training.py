"""Training against HF Trainer, and against what a large matrix product takes."""

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import hydra
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders import Round, contending, in_turn, peak_memory
from benchmarks.timing import Result, Timing
from hyperfitting import models, parameters
from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.data import packaged
from hyperfitting.data.corpus import Tokenizer
from hyperfitting.progress import silent
from hyperfitting.store import Store
from hyperfitting.training.learner import Learner
from hyperfitting.training.trunk import KeptIn, trunk_of

SHAPES = ((8, 128), (8, 256))
ROUNDS = 3
STEPS = {"full": 2, "late_stage": 5}
BLOCKS = 5
EPOCHS = 20
STORE = "outputs/store"


def config(length: int, *overrides: str) -> RunConfig:
    """Return the paper's protocol on the embedded model: 2,000 sequences, 20 epochs."""
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        always = ["preset=paper", f"dataset.seq_len={length}", f"tuning.last_blocks={BLOCKS}"]
        late = "tuning=late_stage" in overrides
        return from_hydra(
            hydra.compose("config", overrides=[*(always if late else always[:2]), *overrides])
        )


def sequences(n: int, length: int) -> NDArray[np.int32]:
    """Return real text as token sequences (n, length)."""
    tokenizer = Tokenizer(models.base_model(config(length).model, Store(STORE)))
    stream: list[int] = []
    for scene in packaged.read("shakespeare"):
        stream += tokenizer(scene)
        if len(stream) >= n * length:
            break
    return np.array(stream[: n * length], dtype=np.int32).reshape(n, length)


def ours(batch: int, length: int, tuning: str) -> Round:
    """Return rounds of our own updates, and of a large matrix product beside them."""
    cfg = config(length, f"tuning={tuning}", f"trainer.batch_size={batch}")
    models.prepare(cfg.hardware)
    base = models.base_model(cfg.model, Store(STORE))
    steps = STEPS[tuning]
    tokens = sequences(steps * batch, length)
    learner = Learner.new(cfg, base)
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        learner.trunk = trunk_of(
            cfg, learner.model, tokens, KeptIn(Store(folder), {"of": "bench"}), silent
        )
        more["trunk_seconds_a_token"] = (time.perf_counter() - start) / tokens.size
        if learner.trunk is not None:
            learner.trunk.activations[:].sum()  # its file goes with the folder; its pages stay
    work = {"full": model_work, "late_stage": late_work}[tuning](learner, length)
    learner.model.train()

    def round_() -> dict[str, Any]:
        seconds = []
        for step in range(steps):
            rows = np.arange(step * batch, (step + 1) * batch)
            start = time.perf_counter()
            learner.update(torch.as_tensor(tokens[rows], dtype=torch.long), rows)
            seconds.append(time.perf_counter() - start)
        more.setdefault("training_memory", peak_memory())  # before the product beside it
        speed = work * batch * length / np.array(seconds)
        return {"seconds": seconds, "of_matmul": (speed / matmul_speed()).tolist(), **more}

    return round_


def model_work(learner: Learner, length: int) -> float:
    """Return the floating-point operations a token of full tuning (Chowdhery et al., 2022, App. B).

    Six for each parameter, and attention's two products forward and twice that backward.
    """
    config = learner.model.config
    n = sum(p.numel() for p in learner.model.parameters())
    return 6 * n + 12 * config.num_hidden_layers * config.hidden_size * length


def late_work(learner: Learner, length: int) -> float:
    """Return the same for the last blocks, and an output layer whose weights are not trained."""
    config = learner.model.config
    blocks = sum(p.numel() for p in learner.trained.values())
    head = learner.model.get_output_embeddings().weight.numel()
    return 6 * blocks + 4 * head + 12 * BLOCKS * config.hidden_size * length


def matmul_speed(size: int = 4096, repeats: int = 3) -> float:
    """Return what a large float32 matrix product reaches in this process, in FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds))


def trainer(batch: int, length: int, tuning: str) -> Round:
    """Return rounds of HF Trainer as a careful user sets it up: fused, no clipping, no extras."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    cfg, steps = config(length), STEPS[tuning]
    model = models.load(models.base_model(cfg.model, Store(STORE)))
    if tuning != "full":
        late = config(length, f"tuning={tuning}").tuning
        parameters.select_trainable(model, late)
    data = [{"input_ids": row, "labels": row} for row in sequences(steps * batch, length).tolist()]
    begun: list[float] = []
    ended: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            begun.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ended.append(time.perf_counter())

    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=steps + 1,
        learning_rate=1e-6, weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        optim="adamw_torch_fused", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    peer = Trainer(model, arguments, train_dataset=data, callbacks=[Watch()])

    def round_() -> dict[str, Any]:
        begun.clear(), ended.clear()
        peer.train()
        # the first step of a call makes the optimizer's state
        return {"seconds": [e - b for b, e in zip(begun, ended, strict=True)][1:]}

    return round_


def _all(measured: list[dict[str, Any]], name: str) -> list[float]:
    return [value for one in measured for value in one[name]]


def run() -> Iterator[Result]:
    """Yield every comparison of this file: of both shapes, the one that is worse for us.

    Memory is compared at the shape that needs more of it.
    """
    found: dict[str, list[Result]] = {}
    for batch, length in SHAPES:
        for result in compare(batch, length):
            found.setdefault(result.key, []).append(result)
    for key, results in found.items():
        chosen = min(results, key=lambda result: result.ratio)
        if key == "train_full_memory_vs_trainer":
            chosen = results[-1]
        both = {f"{b}x{t}": r.ratio for (b, t), r in zip(SHAPES, results, strict=True)}
        chosen.more.update({f"at {shape}": ratio for shape, ratio in both.items()})
        yield chosen


def compare(batch: int, length: int) -> Iterator[Result]:
    """Yield the comparisons at one shape."""
    shape = f"batch {batch} x {length}, smollm2_135m"
    with contending(
        (ours, (batch, length, "full")),
        (trainer, (batch, length, "full")),
        (ours, (batch, length, "late_stage")),
    ) as three:
        full, peer, late = in_turn(three, ROUNDS)
    mine, theirs, late_mine = (Timing(_all(one, "seconds")) for one in (full, peer, late))
    yield Result(
        "train_full_vs_trainer",
        theirs.median / mine.median,
        f"full tuning, times faster than HF Trainer, {shape}",
        mine,
        theirs,
        {"tokens_a_second": batch * length / mine.median},
    )
    memory = [full[0]["training_memory"], max(one["peak_memory"] for one in peer)]
    yield Result(
        "train_full_memory_vs_trainer",
        memory[0] / memory[1],
        f"full tuning, peak memory of the process over HF Trainer's, {shape}",
        mine,
        theirs,
        {"ours_gigabytes": memory[0] / 1e9, "peer_gigabytes": memory[1] / 1e9},
    )
    shares = _all(full, "of_matmul")
    yield Result(
        "train_full_of_matmul",
        float(np.median(shares)),
        f"full tuning, model FLOP/s over those of a 4096^3 float32 product beside it, {shape}",
        mine,
        theirs,
        {"shares": shares},
    )
    trunk = late[0]["trunk_seconds_a_token"] * batch * length
    yield Result(
        "train_late_stage_vs_trainer_full",
        theirs.median / (late_mine.median + trunk / EPOCHS),
        f"the last {BLOCKS} blocks from the trunk cache, times faster than HF Trainer on all, "
        f"the cache's making spread over {EPOCHS} epochs, {shape}",
        late_mine,
        theirs,
        {
            "trunk_seconds_a_batch": trunk,
            "of_matmul": float(np.median(_all(late, "of_matmul"))),
            "tokens_a_second": batch * length / late_mine.median,
        },
    )
    with contending(
        (ours, (batch, length, "late_stage")), (trainer, (batch, length, "late_stage"))
    ) as two:
        late, frozen = in_turn(two, ROUNDS)
    mine, theirs = (Timing(_all(one, "seconds")) for one in (late, frozen))
    yield Result(
        "train_late_stage_vs_trainer_frozen",
        theirs.median / mine.median,
        f"the last {BLOCKS} blocks from the trunk cache, from epoch 2 on, times faster than HF "
        f"Trainer with the other blocks frozen, {shape}",
        mine,
        theirs,
        {},
    )
