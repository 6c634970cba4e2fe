"""`plan=true`: what the runs of a sweep would build, how long that takes, and whether it fits.

The plan walks the same steps as a run (`Pipeline.steps`). No model is loaded and no dataset read.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from hyperfitting.config import RunConfig
from hyperfitting.formatting import duration
from hyperfitting.mechanism.geometry import geometry_bytes
from hyperfitting.mechanism.interventions import derivation_bytes
from hyperfitting.models.size import model_size
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.pipeline.pipeline import Pipeline
from hyperfitting.store.artifact import Store
from hyperfitting.store.manifest import read_manifest
from hyperfitting.sweep.throughput import DeviceSpec, Throughput, device_spec
from hyperfitting.sweep.workers import parallel_seconds
from hyperfitting.training.flops import dtype_bytes, trained_bytes, training_disk_bytes
from hyperfitting.training.memory import (
    FRAMEWORK_BYTES,
    MemoryEstimate,
    estimate_memory,
    reduction_hint,
)

_RUN_SECONDS = 4.0
"""Seconds of a run beside its artifacts: imports, loading, scores and their intervals, writing."""
_WORKER_SECONDS = 8.0
"""Seconds until a worker process has started."""
_VERBS = {
    "tuned": "train",
    "validation": "validate",
    "continuations": "generate",
    "token_stats": "evaluate",
    "layer_geometry": "compare layers",
    "token_shift": "compare ranks",
    "weight_change": "compare weights",
    "logit_lens": "read layers",
    "loop_steps": "trace loops",
    "intervention": "derive weights",
    "patching": "patch",
    "downstream": "answer tasks",
    "chat_answers": "answer questions",
}
_TRAINED = ("tuned", "validation")
"""Kinds that are built by training; validation alone by replaying it."""


@dataclass(frozen=True)
class PlannedMemory:
    """The memory of a run's processes, in bytes for each."""

    available: float
    evaluation: float
    training: MemoryEstimate | None
    """None: nothing has to be trained."""
    hint: str
    """What would lower the larger of the two."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Host memory beside a GPU's, by what takes it."""

    @property
    def peak(self) -> float:
        """The larger of training and evaluation."""
        return max(self.evaluation, self.training.peak if self.training else 0.0)

    @property
    def largest_part(self) -> str:
        """The name and size of what takes most of the peak."""
        if self.training is None or self.evaluation > self.training.peak:
            return f"evaluation with the whole model takes {decimal(int(self.evaluation))}"
        name = self.training.largest
        size = decimal(int(getattr(self.training, name)))
        return f"the largest part, {name.replace('_', ' ')}, takes {size}"


@dataclass(frozen=True)
class PlannedRun:
    """What one run has yet to do."""

    name: str
    builds: Counter[str]
    """Number of artifacts to build, by kind. One that several runs share counts for the first."""
    copies: Counter[Path]
    """Number of artifacts to copy instead, by remote store. Copying takes no time in a plan."""
    seconds: float
    memory: PlannedMemory | None
    """None: the run has finished."""
    disk_bytes: float

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.memory is None

    @property
    def peak_bytes(self) -> float:
        """Peak memory of each process."""
        return 0.0 if self.memory is None else self.memory.peak

    @property
    def todo(self) -> str:
        """What it has yet to do, in words."""
        if self.is_finished:
            return "nothing: finished"
        kinds = set(self.builds)
        if "tuned" in kinds:
            kinds.discard("validation")  # a part of the training
        built = ", ".join(verb for kind, verb in _VERBS.items() if kind in kinds) or "score"
        copied = [f"{n} copied from {store}" for store, n in self.copies.items()]
        return "; ".join([*copied, built])


@dataclass(frozen=True)
class Plan:
    """What all runs have yet to do, in their order."""

    runs: list[PlannedRun]
    workers: int = 1

    @property
    def unfinished(self) -> list[PlannedRun]:
        """The runs that have something left to do."""
        return [run for run in self.runs if not run.is_finished]

    @property
    def seconds(self) -> float:
        """How long all of it takes, divided between the workers."""
        durations = [run.seconds for run in self.unfinished]
        if not durations:
            return 0.0
        return _WORKER_SECONDS + parallel_seconds(durations, self.workers)


def make_plan(
    configs: Mapping[str, RunConfig], finished: frozenset[str] = frozenset(), workers: int = 1
) -> Plan:
    """Return the plan of runs.

    Args:
        configs: by name of the run.
        finished: names of runs that have nothing left to do.
        workers: runs at the same time.

    Raises:
        UserError: a model or dataset does not exist, or the machine lacks a device.
    """
    planned_ids: set[str] = set()
    throughputs: dict[tuple[str, DeviceSpec], Throughput] = {}
    runs = []
    for name, cfg in configs.items():
        if name in finished:
            runs.append(PlannedRun(name, Counter(), Counter(), 0.0, None, 0.0))
            continue
        spec = device_spec(cfg)
        throughput = throughputs.setdefault((cfg.store, spec), Throughput(Path(cfg.store), spec))
        runs.append(_plan_run(name, cfg, spec, throughput, planned_ids))
    return Plan(runs, workers)


def _plan_run(
    name: str, cfg: RunConfig, spec: DeviceSpec, throughput: Throughput, planned_ids: set[str]
) -> PlannedRun:
    """Return the plan of one run; adds the ids of what it builds or copies to ``planned_ids``."""
    pipeline = build_pipeline(cfg, torch.device("cpu"))
    builds: Counter[str] = Counter()
    copies: Counter[Path] = Counter()
    seconds, disk_bytes = _RUN_SECONDS, 0.0
    for step in pipeline.steps:
        if step.artifact.id in planned_ids or step.artifact.exists:
            continue
        planned_ids.add(step.artifact.id)
        if (remote := step.artifact.remote) is not None:
            copies[remote.parents[1]] += 1
            disk_bytes += sum(file.bytes for file in read_manifest(remote).files.values())
            continue
        builds[step.artifact.kind] += 1
        seconds += throughput.seconds(step)
    trains = any(kind in builds for kind in _TRAINED)
    if trains and pipeline.training is not None and spec.is_local:
        pipeline.training.check_device()
    if trains:
        size = model_size(pipeline.base, Store(cfg.store, cfg.remote_stores))
        disk_bytes += training_disk_bytes(cfg.training, cfg.dataset, size, cfg.model.dtype)
    memory = _plan_memory(cfg, spec, pipeline, trains)
    return PlannedRun(name, builds, copies, seconds, memory, disk_bytes)


def _plan_memory(
    cfg: RunConfig, spec: DeviceSpec, pipeline: Pipeline, trains: bool
) -> PlannedMemory:
    store = Store(cfg.store, cfg.remote_stores)
    size = model_size(pipeline.base, store)
    tuned_dtype = cfg.intervention.derived_dtype(cfg.model.dtype)
    base_bytes, tuned_bytes = dtype_bytes(cfg.model.dtype), dtype_bytes(tuned_dtype)
    compares = bool(cfg.mechanism.measures)  # with both models in memory
    bytes_each = base_bytes + tuned_bytes if compares else max(base_bytes, tuned_bytes)
    weights: float = size.n_params * bytes_each
    if cfg.hardware.device_map:
        weights /= spec.count
    evaluation = weights + FRAMEWORK_BYTES[spec.device_type]
    if "geometry" in cfg.mechanism.measures:  # all of its sums are on the first GPU
        n_texts = cfg.evaluation.n_texts * len(cfg.evaluation_datasets)
        evaluation += geometry_bytes(size, n_texts)
    on_host, deriving = {}, 0.0
    if cfg.intervention.is_on:
        deriving = derivation_bytes(cfg.intervention, cfg.tuning, size, cfg.model.dtype)
        on_host["deriving the weights of an intervention"] = deriving
    if trains:
        written = trained_bytes(cfg.tuning, size, cfg.model.dtype)
        on_host["writing the trained parameters, by rank 0,"] = written
    if spec.device_type == "cpu":  # part of the process's memory
        evaluation = max(evaluation, deriving + FRAMEWORK_BYTES["cpu"])
        on_host = {}
    hint = "hardware.device_map=auto, with several GPUs; model.dtype=bfloat16; a smaller model"
    if compares:
        hint = f"mechanism=none, which needs one model in memory and not two; {hint}"
    if not trains:
        return PlannedMemory(spec.memory_bytes, evaluation, None, hint, on_host)
    shape = cfg.dataset.n_train, cfg.dataset.seq_len
    training = estimate_memory(
        cfg.training, shape, pipeline.base, store, spec.device_type, spec.memory_bytes, spec.count
    )
    if training.peak >= evaluation:
        hint = reduction_hint(training, cfg.training, spec.count)
    return PlannedMemory(spec.memory_bytes, evaluation, training, hint, on_host)


def show(plan: Plan, console: Console) -> None:
    """Print a plan, and which of its runs do not fit into memory."""
    console.print(plan_table(plan))
    if len(plan.runs) == 1 and (memory := plan.runs[0].memory) and memory.training:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {decimal(int(size))}"
            for name, size in vars(memory.training).items()
            if size
        )
        console.print(f"training: {parts}", highlight=False, soft_wrap=True)
    for purpose, size in _host_memory(plan).items():
        text = f"{purpose} takes {decimal(int(size))} of host memory"
        console.print(text, highlight=False, soft_wrap=True)
    for problem in _memory_problems(plan):
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table."""
    unfinished = plan.unfinished
    workers = f", {plan.workers} workers" if plan.workers > 1 else ""
    table = Table(
        box=SIMPLE,
        show_footer=True,
        caption=f"What several runs share counts for the first{workers}. "
        "Memory: peak of one process.",
    )
    table.add_column("run", f"{len(plan.runs)} run{'s' * (len(plan.runs) > 1)}", overflow="fold")
    table.add_column("to do", f"{len(plan.runs) - len(unfinished)} finished")
    table.add_column("time", duration(plan.seconds), justify="right")
    peak = max((run.peak_bytes for run in unfinished), default=0.0)
    table.add_column("memory", decimal(int(peak)), justify="right")
    disk = sum(run.disk_bytes for run in unfinished)
    table.add_column("disk", decimal(int(disk)), justify="right")
    for run in plan.runs:
        cells = ["", "", ""]
        if not run.is_finished:
            sizes = [decimal(int(n)) if n else "" for n in (run.peak_bytes, run.disk_bytes)]
            cells = [duration(run.seconds), *sizes]
        table.add_row(run.name, run.todo, *cells)
    return table


def _host_memory(plan: Plan) -> dict[str, float]:
    """Return the most host memory that any run needs beside a GPU's, by what takes it."""
    needs: dict[str, float] = {}
    for run in plan.unfinished:
        for purpose, size in (run.memory.host if run.memory else {}).items():
            needs[purpose] = max(size, needs.get(purpose, 0.0))
    return needs


def _memory_problems(plan: Plan) -> list[str]:
    """Return a message for each group of runs that do not fit, for the same reason."""
    names: dict[str, list[str]] = {}
    for run in plan.unfinished:
        memory = run.memory
        if memory is None or memory.peak <= memory.available:
            continue
        needed, available = decimal(int(memory.peak)), decimal(int(memory.available))
        problem = (
            f"needs {needed} per process, and {available} are available; {memory.largest_part}\n"
            f"  try:   {memory.hint}"
        )
        names.setdefault(problem, []).append(run.name)
    return [f"{', '.join(runs)}: {problem}" for problem, runs in names.items()]
