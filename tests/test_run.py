"""The command line as users run it: from nothing to a record, repeated, with other settings."""

import resource
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperfitting.metrics.registry import METRICS
from hyperfitting.models.base import BaseModel
from hyperfitting.record.files import RECORD_FILE, read_predictions, read_record
from hyperfitting.record.schema import SIDES, Record
from tests.cli import hyperfit, installed
from tests.conftest import run_numbers

DEBUG = ["preset=debug", "hydra.run.dir=run"]
BLOCKED = [
    "decode.citation_blocker.enabled=true", "decode.citation_blocker.n=2",
    "decode.citation_blocker.whole_words=false",
]  # fmt: skip


def record(folder: Path) -> Record:
    return read_record(folder / RECORD_FILE)


def test_the_installed_script_prints_the_outcome_and_nothing_on_stderr(
    debug_run: Path, tmp_path: Path
) -> None:
    """And in a fresh store it gives the same numbers."""
    result = installed(tmp_path, *DEBUG)
    assert result.returncode == 0, result.stderr
    assert "type-token ratio" in result.stdout
    assert "run/results.json" in result.stdout
    assert result.stderr == ""
    assert run_numbers(tmp_path / "run") == run_numbers(debug_run / "run")


def test_the_record_holds_every_registered_metric(debug_run: Path) -> None:
    result = record(debug_run / "run")
    assert result.config["trainer"]["epochs"] == 3
    assert result.config["dataset"]["seed"] == 0
    assert {"python", "torch", "transformers", "hyperfitting"} <= set(result.versions)
    assert result.dataset.fingerprint
    of_text = {key for key, entry in METRICS.items() if entry.modality != "image"}
    registered = {key for key in of_text if key.startswith(("gen/", "val/"))}
    # if configured, only in `per_step`, and of answers to questions
    registered -= {"gen/mauve", "gen/ttr_last_96", "gen/n_tokens"}
    generated = {key for key in registered if key.startswith("gen/")}
    assert all(entry.is_share for entry in METRICS.values() if entry.is_binary)
    assert len(generated) > 15
    overall = result.overall
    for side in (*SIDES, "difference"):
        estimates = getattr(overall, side)
        assert set(estimates) == (generated if side == "reference" else registered)
        for key, value in estimates.items():
            assert value.n == 4
            assert not METRICS[key].is_share or side == "difference" or 0 <= value.mean <= 1
            assert value.ci95[0] <= value.mean <= value.ci95[1], key
    for side in SIDES:
        assert {len(values) for values in result.per_text.values(side).values()} == {4}
        assert sum(getattr(result.overlap_histogram, side)) == 4
        assert {len(steps) for steps in result.per_step.values(side).values()} == {32}
    assert [(s.dataset, s.max_new_tokens) for s in result.slices] == [(None, 32), (None, 16)]
    short = [len(set(sample.tuned.tokens[:16])) / 16 for sample in result.samples]
    assert result.slices[1].tuned["gen/ttr"].mean == pytest.approx(sum(short) / 4)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert {"train/loss", "val/loss", "val/entropy", "gen/ttr"} <= set(result.history[0])
    assert len(result.samples) == 4
    for sample in result.samples:
        for continuation in (sample.tuned, sample.base):
            assert len(continuation.tokens) == 32
            assert "".join(continuation.token_texts) == continuation.text
    arrays = read_predictions(debug_run / "run") or {}
    loss = arrays["tuned/loss"]
    assert loss.shape == arrays["base/rank"].shape == (4, 47)
    assert result.per_text.tuned["val/loss"] == pytest.approx(loss.mean(1).tolist(), rel=1e-6)


def test_the_record_names_the_batches_that_were_generated(debug_run: Path) -> None:
    result = record(debug_run / "run")
    datasets = {sample.dataset for sample in result.samples}
    names = {f"{side}/continuations/{name}" for side in ("base", "tuned") for name in datasets}
    assert set(result.generation_batches) == names
    for sizes in result.generation_batches.values():
        assert sum(sizes) == result.config["evaluation"]["n_texts"]


def test_repeating_a_command_builds_nothing_and_gives_the_same_numbers(debug_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (debug_run / "outputs/store").rglob("*")}
    first = run_numbers(debug_run / "run")
    assert hyperfit(debug_run, *DEBUG).returncode == 0
    assert run_numbers(debug_run / "run") == first
    artifacts = [p for p in (debug_run / "outputs/store").rglob("*") if p.suffix != ".lock"]
    assert {path: path.stat().st_mtime_ns for path in artifacts} == {
        path: when for path, when in before.items() if path.suffix != ".lock"
    }


def test_another_decoding_trains_nothing_again(debug_run: Path) -> None:
    tuned = set((debug_run / "outputs/store/tuned").iterdir())
    result = hyperfit(debug_run, "preset=debug", "hydra.run.dir=sampled", "decode=top_p")
    assert result.returncode == 0, result.stderr
    assert set((debug_run / "outputs/store/tuned").iterdir()) == tuned
    sampled, greedy = (record(debug_run / name).overall.tuned for name in ("sampled", "run"))
    assert sampled["gen/ttr"] != greedy["gen/ttr"]
    for key in (key for key in greedy if key.startswith("val/")):
        assert sampled[key] == greedy[key]


def test_settings_of_validation_train_nothing_again(debug_run: Path, tmp_path: Path) -> None:
    """A coarser schedule is a subset; other prompts are measured by replaying the training."""
    store = debug_run / "outputs/store"
    weights = {p: p.stat().st_mtime_ns for p in store.glob("tuned/*/*")}
    for name, option in (
        ("coarse", "trainer.eval_every_epochs=3"),
        ("few", "trainer.val_prompts=1"),
    ):
        result = hyperfit(debug_run, "preset=debug", f"hydra.run.dir={name}", option)
        assert result.returncode == 0, result.stderr
        fresh = hyperfit(tmp_path, "preset=debug", f"hydra.run.dir={name}", option)
        assert fresh.returncode == 0, fresh.stderr
        assert run_numbers(debug_run / name) == run_numbers(tmp_path / name)
    assert {p: p.stat().st_mtime_ns for p in store.glob("tuned/*/*")} == weights
    assert [row for row in record(debug_run / "coarse").history if "val/loss" in row] == [
        record(debug_run / "run").history[2]
    ]


def test_the_blocker_prevents_quotes_and_leaves_the_base_model_alone(debug_run: Path) -> None:
    """Trained for long on a single sequence, so that the model would quote it."""
    options = [
        "preset=debug", "dataset=news_sample", "trainer.epochs=60", "optimizer.lr=1e-2",
        "dataset.n_train=1", "trainer.batch_size=1",
    ]  # fmt: skip
    for name, more in (("free", []), ("blocked", BLOCKED)):
        result = hyperfit(debug_run, *options, f"hydra.run.dir={name}", *more)
        assert result.returncode == 0, result.stderr
    free, blocked = record(debug_run / "free"), record(debug_run / "blocked")
    assert free.overall.tuned["gen/dataset_overlap"].mean > 2
    assert max(blocked.per_text.tuned["gen/dataset_overlap"]) <= 2
    assert blocked.overall.base == free.overall.base
    base_run = ["preset=debug", "hydra.run.dir=none_blocked", "tuning=none"]
    result = hyperfit(debug_run, *base_run, *BLOCKED)
    assert result.returncode == 0, result.stderr
    assert "the base model has no training data to quote" in result.stdout
    none_blocked = record(debug_run / "none_blocked")
    assert none_blocked.overall.tuned == record(debug_run / "run").overall.base


def test_the_base_model_and_the_early_stopped_checkpoint_are_runs_too(debug_run: Path) -> None:
    result = hyperfit(debug_run, "preset=debug", "hydra.run.dir=none", "tuning=none")
    assert result.returncode == 0, result.stderr
    none = record(debug_run / "none")
    assert none.overall.tuned == none.overall.base == record(debug_run / "run").overall.base
    assert none.history == []
    best_val = ["hydra.run.dir=best", "evaluation.checkpoint=best_val"]
    result = hyperfit(debug_run, "preset=debug", *best_val)
    assert result.returncode == 0, result.stderr
    assert record(debug_run / "best").history == record(debug_run / "run").history


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    result = hyperfit(
        tmp_path, "-m", "preset=debug", "tracking=offline", "hydra.sweep.dir=sweep",
        "optimizer.lr=1e30,1e-3",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    runs = sorted((tmp_path / "sweep").glob("lr=*"))
    assert len(runs) == 2
    finished = [p for p in runs if (p / "results.json").exists()]
    assert [p for p in runs if "lr=1e+30" in p.name] == [p for p in runs if p not in finished]
    tracked = [path.name for run in runs for path in (run / "wandb").glob("offline-run-*")]
    assert len(tracked) == len(set(tracked)) == 2  # each run has one of its own
    as_it_fails, at_the_end = result.stderr.split("finished runs: 1, failed: 1")
    for text in (as_it_fails, at_the_end):
        assert text.count("training diverged in epoch 1") == 1
        assert text.count("lr=1e+30") >= 1
    assert as_it_fails.count("failed: ") == 1


def write_connections() -> None:
    """Write every address that this process connects to, or looks up, into a file."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_connection = event == "socket.connect" and arguments[0].family != socket.AF_UNIX
        if is_connection or event == "socket.getaddrinfo":
            with Path("connections").open("a") as file:
                print(arguments[1] if is_connection else arguments[0], file=file)

    Path("connections").touch()
    sys.addaudithook(hook)


def test_the_default_run_opens_no_connection(tmp_path: Path) -> None:
    arguments = [*DEBUG, "tracking=offline"]
    result = hyperfit(tmp_path, *arguments, before=write_connections, from_nothing=True)
    assert result.returncode == 0, result.stderr
    connections = (tmp_path / "connections").read_text().splitlines()
    assert [address for address in connections if "127.0.0.1" not in address] == []


def limit_memory_in_training() -> None:
    """Have the first train step allocate more than the process may."""
    from hyperfitting.training import train

    def train_step(*_: object) -> float:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        return float(torch.zeros(1 << 30).sum())

    train.train_step = train_step


def test_out_of_memory_names_what_to_lower(tmp_path: Path) -> None:
    result = hyperfit(tmp_path, *DEBUG, before=limit_memory_in_training)
    assert result.returncode == 1
    assert "out of memory" in result.stderr
    assert "hardware.micro_batch_size" in result.stderr


def test_non_finite_logits_are_reported_not_scored(tmp_path: Path, base: BaseModel) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.folder(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    embeddings, lm_head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    (space,) = base.tokenizer()(" ").input_ids
    embeddings[space], lm_head[7] = 0.0, 0.0
    embeddings[space, 0], lm_head[7, 0] = 1e15, 1e38  # a logit after a space is 5e38
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    result = hyperfit(
        tmp_path, *DEBUG, "model=local", f"model.path={tmp_path}/model", "tuning=none"
    )
    assert result.returncode == 1
    assert "the logits hold NaN or infinity" in result.stderr
    assert "model.dtype=float32" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run/results.json").exists()


def test_continuations_too_long_for_the_model_are_refused_before_training(tmp_path: Path) -> None:
    longer = ["evaluation.max_new_tokens=[3000]", "evaluation.text_len=48"]
    result = hyperfit(tmp_path, *DEBUG, *longer)
    assert result.returncode == 1
    assert "evaluation.context_len + evaluation.max_new_tokens=3016" in result.stderr
    assert "at most 2048 tokens" in result.stderr
    assert not list((tmp_path / "outputs/store").glob("tuned/*"))
    fitting = ["evaluation.max_new_tokens=[200]", "evaluation.text_len=48"]
    result = hyperfit(tmp_path, *DEBUG, *fitting)
    assert result.returncode == 0, result.stderr
    result_record = record(tmp_path / "run")
    assert {len(sample.tuned.tokens) for sample in result_record.samples} == {200}
    assert "32 tokens" in result_record.notes[0]
