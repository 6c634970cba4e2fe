"""Speed on this device: ceilings, training, decoding and scoring against named peers."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import CONTEXT_LEN, GREEDY, Lab, release
from benchmarks.gpu.training_checks import precisions
from benchmarks.hf_trainer import build_trainer
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.models.loading import load
from hyperfitting.models.trainable import select_trainable
from hyperfitting.progress import no_op
from hyperfitting.runtime.numerics import matmul_precision
from hyperfitting.sweep.throughput import measure_matmul
from hyperfitting.training.step import TrainState, train_step
from hyperfitting.training.validation import validate

TOP_P = DecodeConfig("top_p", strategy="sample", temperature=0.7, top_k=50, top_p=0.9, seed=0)
NUCLEUS = DecodeConfig("nucleus", strategy="sample", top_p=0.9, seed=0)

_VARIANTS = {
    "": ["hardware.compile=false"],
    ", compiled": ["hardware.compile=true"],
    ", compiled, not deterministic": ["hardware.compile=true", "hardware.deterministic=false"],
}


def ceilings(lab: Lab) -> Iterator[Finding]:
    """Measure large matrix products in each precision, and a copy."""
    for precision in precisions(lab):
        tflops = measure_matmul(lab.device.type, precision) / 1e12
        yield Finding(f"matrix product, {precision}", {"tflops": tflops})
    source = torch.empty(2**29 if lab.on_gpu else 2**22, device=lab.device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lab, lambda: target.copy_(source))
    yield Finding("copy", {"gb_per_second": 2 * source.nbytes / seconds / 1e9})


def training(lab: Lab) -> Iterator[Finding]:
    """Time train steps of TinyLlama's shape in every precision, against HF Trainer."""
    size = f"{lab.shapes.batch_size} x {lab.shapes.seq_len}"
    for precision in precisions(lab):
        peer = trainer_seconds(lab, precision, [])
        yield Finding(f"HF Trainer, {size}, {precision}", {"ms_per_step": 1e3 * peer})
        for variant, overrides in _VARIANTS.items():
            if variant and precision == "float32":
                continue
            cfg = lab.config(f"trainer.precision={precision}", *overrides)
            measured = time_training(lab, "medium", "float32", cfg, precision)
            measured["times_faster_than_trainer"] = 1e3 * peer / measured["ms_per_step"]
            yield Finding(f"full, {size}, {precision}{variant}", measured)


def late_stage(lab: Lab) -> Iterator[Finding]:
    """Time the last blocks from the activation cache, against HF Trainer with the same trained."""
    tuning = ["tuning=late_stage", f"tuning.last_blocks={lab.shapes.last_blocks}"]
    for precision in precisions(lab):
        peer = trainer_seconds(lab, precision, tuning)
        cfg = lab.config(f"trainer.precision={precision}", *tuning)
        measured = time_training(lab, "medium", "float32", cfg, None)
        measured["times_faster_than_trainer"] = 1e3 * peer / measured["ms_per_step"]
        yield Finding(f"last {lab.shapes.last_blocks} blocks, {precision}", measured)


def large_model(lab: Lab) -> Iterator[Finding]:
    """Time train steps and decoding of an 8B model in bfloat16."""
    cfg = lab.config(
        "model.dtype=bfloat16", "optimizer=adam_8bit", "hardware.compile=false",
    )  # fmt: skip
    with lab.peak_memory() as memory:
        measured = time_training(lab, "large", "bfloat16", cfg, "bfloat16")
    yield Finding("full, bfloat16 weights, adam_8bit", measured | memory)
    release(lab.device)
    yield Finding("greedy, bfloat16", _DecodeTimer.of_texts(lab, "large", "bfloat16").ours())


def decoding(lab: Lab) -> Iterator[Finding]:
    """Time decoding of TinyLlama's shape, against transformers' `generate`."""
    for dtype in ("bfloat16", "float32"):
        yield from _time_decoding(lab, dtype)


def _time_decoding(lab: Lab, dtype: str) -> Iterator[Finding]:
    timer = _DecodeTimer.of_texts(lab, "medium", dtype)
    size = f"{timer.size}, {dtype}"
    peer = timer.generate()
    yield Finding(f"generate, {size}", {"ms_per_token": peer})
    data = lab.tokens("medium", 2000 if lab.on_gpu else 20)
    rule = CitationBlockerConfig(True, whole_words=False)
    blocker = CitationBlocker(data, rule, str)
    for name, decode, constraint in (
        ("greedy", GREEDY, None), ("top-k, top-p", TOP_P, None), ("top-p", NUCLEUS, None),
        ("greedy, blocker", GREEDY, blocker),
    ):  # fmt: skip
        measured = timer.ours(decode, constraint)
        measured["times_faster_than_generate"] = peer / measured["ms_per_token"]
        yield Finding(f"{name}, {size}", measured)


def images(lab: Lab) -> Iterator[Finding]:
    """Time completing images from their first quarter, against transformers' `generate`."""
    shape = lab.shapes.image
    contexts = lab.tokens("image", lab.shapes.n_images, shape["n_positions"] // 4 + 1)
    contexts[:, 0] = shape["vocab_size"] - 1  # SOS
    n_new = shape["n_positions"] + 1 - contexts.shape[1]
    timer = _DecodeTimer(lab, lab.model("image", "bfloat16"), contexts, n_new, rounds=1)
    peer, measured = timer.generate(), timer.ours()
    measured["times_faster_than_generate"] = peer / measured["ms_per_token"]
    yield Finding(f"{timer.size} pixels, bfloat16", measured)


def static_generate(lab: Lab) -> Iterator[Finding]:
    """Time `generate` over a static cache, which transformers compiles on a GPU."""
    timer = _DecodeTimer.of_texts(lab, "medium", "bfloat16")
    yield Finding(f"{timer.size}, bfloat16", {"ms_per_token": timer.generate("static")})


def scoring(lab: Lab) -> Iterator[Finding]:
    """Time token statistics of many texts, relative to the bare forward pass."""
    for dtype in ("float32", "bfloat16"):
        yield _time_scoring(lab, dtype)


def _time_scoring(lab: Lab, dtype: str) -> Finding:
    texts = lab.tokens("medium", lab.shapes.n_scored)
    model = lab.model("medium", dtype)

    def forward() -> None:
        with torch.inference_mode():
            for start in range(0, len(texts), 8):
                batch = torch.as_tensor(texts[start : start + 8], dtype=torch.long)
                model(input_ids=batch.to(lab.device), use_cache=False)

    bare = _median_seconds(lab, forward, 3)
    ours = _median_seconds(lab, lambda: compute_token_stats(model, texts, 8), 3)
    return Finding(
        f"{len(texts)} x {texts.shape[1]}, {dtype}",
        {"seconds": ours, "forward_seconds": bare, "times_forward": ours / bare},
    )


def table1_row(lab: Lab) -> Iterator[Finding]:
    """Extrapolate one row of Table 1 (Carlsson et al., section 4) from a part of each of its parts.

    2,000 sequences, 20 epochs with validation; then 300 texts of three datasets.
    """
    cfg = lab.config("trainer.precision=bfloat16")
    trainer = cfg.training.trainer
    data = lab.sequences("medium", 2 * lab.shapes.batch_size, n_val=128 if lab.on_gpu else 4)
    state = lab.train_state("medium", "float32", cfg, data.train)
    rows = np.arange(lab.shapes.batch_size)
    batch = torch.as_tensor(data.train[rows], dtype=torch.long)
    compile_seconds = 2 * _steps(lab, state, batch, rows, 2)
    seconds = {"step": _steps(lab, state, batch, rows, 4 * lab.shapes.steps)}
    texts = lab.tokens("medium", lab.shapes.n_scored)
    n_new = lab.shapes.max_new_tokens
    hardware = cfg.training.hardware
    jobs: dict[str, Callable[[], object]] = {
        "validation": lambda: validate(state.model, data, trainer, hardware, no_op),
        "generation": lambda: continue_texts(
            state.model.eval(), texts[:, :CONTEXT_LEN], n_new, GREEDY
        ),
        "scoring": lambda: compute_token_stats(state.model, texts, 8),
    }
    for name, job in jobs.items():
        seconds[name] = _median_seconds(lab, job, repeats=1, warmups=0)
    n_steps = trainer.epochs * 2000 // trainer.batch_size
    total = (
        compile_seconds + n_steps * seconds["step"] + trainer.epochs * seconds["validation"]
        + 3 * (seconds["generation"] + seconds["scoring"])
    )  # fmt: skip
    measured = {f"{name}_seconds": value for name, value in seconds.items()}
    yield Finding(f"{n_steps} steps, extrapolated", {"minutes": total / 60, **measured})


def time_training(
    lab: Lab, shape: str, dtype: str, cfg: Any, ceiling: str | None
) -> dict[str, float]:
    """Return the speed of train steps: median, and fraction of a matrix product's speed."""
    batch_size = lab.shapes.batch_size
    tokens = lab.tokens(shape, 2 * batch_size)
    start = time.perf_counter()
    state = lab.train_state(shape, dtype, cfg, tokens)
    lab.synchronize()
    loaded = time.perf_counter() - start
    batch, rows = torch.as_tensor(tokens[:batch_size], dtype=torch.long), np.arange(batch_size)
    start = time.perf_counter()
    _steps(lab, state, batch, rows, 2)
    first = time.perf_counter() - start
    rounds = [_steps(lab, state, batch, rows, lab.shapes.steps) for _ in range(lab.shapes.rounds)]
    seconds = median(rounds)
    measured = {
        "ms_per_step": 1e3 * seconds, "load_seconds": loaded, "first_steps_seconds": first,
    }  # fmt: skip
    if ceiling is not None:
        n = sum(p.numel() for p in state.model.parameters())
        n -= state.model.get_input_embeddings().weight.numel()
        flops = 6 * n * batch.numel()
        measured["fraction_of_matmul"] = flops / seconds / measure_matmul(lab.device.type, ceiling)
    del state
    release(lab.device)
    return measured


def _steps(
    lab: Lab, state: TrainState, batch: torch.Tensor, rows: NDArray[np.int64], n: int
) -> float:
    """Return the mean seconds of ``n`` train steps."""
    lab.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        train_step(state, batch, rows)
    lab.synchronize()
    return (time.perf_counter() - start) / n


def trainer_seconds(lab: Lab, precision: str, tuning: list[str]) -> float:
    """Return the median seconds of a step of HF Trainer."""
    model = load(lab.base("medium"))
    if tuning:
        select_trainable(model, lab.config(*tuning).tuning)
    steps = lab.shapes.steps * lab.shapes.rounds
    batch_size = lab.shapes.batch_size
    ends: list[float] = []

    def on_step_end(n_steps: int) -> None:
        if (n_steps - 2) % lab.shapes.steps == 0:  # as often as in `_steps`
            lab.synchronize()
            ends.append(time.perf_counter())

    trainer = build_trainer(
        model, lab.tokens("medium", batch_size).tolist() * (steps + 3), batch_size, steps + 2,
        lambda _: None, on_step_end, output_dir=str(lab.folder / "trainer"),
        use_cpu=not lab.on_gpu, bf16=precision == "bfloat16",
    )  # fmt: skip
    with matmul_precision(lab.device, precision):
        trainer.train()
    del model, trainer
    release(lab.device)
    return median(np.diff(ends).tolist()) / lab.shapes.steps


@dataclass(frozen=True)
class _DecodeTimer:
    """Times the continuation of contexts (B, T) by ``n_new`` tokens."""

    lab: Lab
    model: PreTrainedModel
    contexts: NDArray[np.int32]
    n_new: int
    rounds: int

    @classmethod
    def of_texts(cls, lab: Lab, shape: str, dtype: str) -> "_DecodeTimer":
        contexts = lab.tokens(shape, lab.shapes.n_texts, CONTEXT_LEN)
        sizes = (lab.shapes.max_new_tokens, lab.shapes.rounds)
        return cls(lab, lab.model(shape, dtype), contexts, *sizes)

    @property
    def size(self) -> str:
        return f"{len(self.contexts)} x {self.n_new}"

    def ours(
        self, decode: DecodeConfig = GREEDY, blocker: CitationBlocker | None = None
    ) -> dict[str, float]:
        """Return milliseconds per token and, on a GPU, the peak memory."""
        batch_size = len(self.contexts)

        def job() -> None:
            continue_texts(
                self.model, self.contexts, self.n_new, decode, batch_size, blocker=blocker
            )

        with self.lab.peak_memory() as memory:
            seconds = _median_seconds(self.lab, job, self.rounds)
        return {"ms_per_token": 1e3 * seconds / self.n_new, **memory}

    def generate(self, cache: str | None = None) -> float:
        """Return the milliseconds per token of transformers' `generate`."""
        ids = torch.as_tensor(self.contexts, dtype=torch.long, device=self.lab.device)
        options = {} if cache is None else {"cache_implementation": cache}

        def job() -> None:
            with torch.inference_mode() if cache is None else nullcontext():
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.n_new,
                    min_new_tokens=self.n_new, do_sample=False, pad_token_id=0, **options,
                )  # fmt: skip

        return 1e3 * _median_seconds(self.lab, job, min(2, self.rounds)) / self.n_new


def _median_seconds(
    lab: Lab, job: Callable[[], object], repeats: int = 5, warmups: int = 1
) -> float:
    """Return the median seconds of a job, after some that are not counted."""
    times = []
    for i in range(warmups + repeats):
        lab.synchronize()
        start = time.perf_counter()
        job()
        lab.synchronize()
        if i >= warmups:
            times.append(time.perf_counter() - start)
    return median(times)
