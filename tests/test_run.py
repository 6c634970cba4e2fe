"""The command line as users run it: from nothing to a record, killed, repeated, swept, cut off."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.metrics.registry import METRICS
from hyperfitting.models.base import BaseModel
from hyperfitting.record import SIDES, Record, read_predictions, read_record
from tests.conftest import below, command, environment, hyperfit, small_disk

BLOCKED = [
    "decode.citation_blocker.enabled=true", "decode.citation_blocker.n=2",
    "decode.citation_blocker.whole_words=false",
]  # fmt: skip
DEBUG = ["preset=debug", "hydra.run.dir=run"]


def record(folder: Path) -> Record:
    return read_record(folder / "results.json")


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that a repetition must reproduce: all but times and places."""
    return record(folder).model_dump(exclude={"timings", "git", "artifacts"})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the debug run has ended."""
    folder = tmp_path_factory.mktemp("debug")
    result = hyperfit(folder, *DEBUG)
    assert result.returncode == 0, result.stderr
    assert "type-token ratio" in result.stdout
    assert "run/results.json" in result.stdout
    assert result.stderr == ""
    return folder


def test_the_record_holds_every_registered_metric(done: Path) -> None:
    result = record(done / "run")
    assert result.config["trainer"]["epochs"] == 3
    assert result.config["dataset"]["seed"] == 0
    assert {"python", "torch", "transformers", "hyperfitting"} <= set(result.versions)
    assert result.dataset.fingerprint
    registered = {key for key in METRICS if key.startswith(("gen/", "val/"))} - {"gen/mauve"}
    generated = {key for key in registered if key.startswith("gen/")}
    assert len(generated) > 15
    overall = result.overall
    for side in (*SIDES, "difference"):
        estimates = getattr(overall, side)
        assert set(estimates) == (generated if side == "reference" else registered)
        for key, value in estimates.items():
            assert value.n == 4
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
    arrays = read_predictions(done / "run") or {}
    loss = arrays["tuned/loss"]
    assert loss.shape == arrays["base/rank"].shape == (4, 47)
    assert result.per_text.tuned["val/loss"] == pytest.approx(loss.mean(1).tolist(), rel=1e-6)


def test_repeating_a_command_builds_nothing_and_gives_the_same_numbers(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "outputs/store").rglob("*")}
    first = numbers(done / "run")
    assert hyperfit(done, *DEBUG).returncode == 0
    assert numbers(done / "run") == first
    artifacts = [p for p in (done / "outputs/store").rglob("*") if p.suffix != ".lock"]
    assert {path: path.stat().st_mtime_ns for path in artifacts} == {
        path: when for path, when in before.items() if path.suffix != ".lock"
    }


def test_another_decoding_trains_nothing_again(done: Path) -> None:
    tuned = set((done / "outputs/store/tuned").iterdir())
    result = hyperfit(done, "preset=debug", "hydra.run.dir=sampled", "decode=top_p")
    assert result.returncode == 0, result.stderr
    assert set((done / "outputs/store/tuned").iterdir()) == tuned
    sampled, greedy = (record(done / name).overall.tuned for name in ("sampled", "run"))
    assert sampled["gen/ttr"] != greedy["gen/ttr"]
    for key in (key for key in greedy if key.startswith("val/")):
        assert sampled[key] == greedy[key]


def test_settings_of_validation_train_nothing_again(done: Path, tmp_path: Path) -> None:
    """A coarser schedule is a subset; other prompts are measured by replaying the training."""
    tuned = set((done / "outputs/store/tuned").iterdir())
    weights = {p: p.stat().st_mtime_ns for p in (done / "outputs/store").glob("tuned/*/*")}
    for name, option in (
        ("coarse", "trainer.eval_every_epochs=3"),
        ("few", "trainer.val_prompts=1"),
    ):
        result = hyperfit(done, "preset=debug", f"hydra.run.dir={name}", option)
        assert result.returncode == 0, result.stderr
        fresh = hyperfit(tmp_path, "preset=debug", f"hydra.run.dir={name}", option)
        assert fresh.returncode == 0, fresh.stderr
        assert numbers(done / name) == numbers(tmp_path / name)
    assert set((done / "outputs/store/tuned").iterdir()) == tuned
    assert {p: p.stat().st_mtime_ns for p in (done / "outputs/store").glob("tuned/*/*")} == weights
    assert [row for row in record(done / "coarse").history if "val/loss" in row] == [
        record(done / "run").history[2]
    ]


def test_the_blocker_prevents_quotes_and_leaves_the_base_model_alone(done: Path) -> None:
    """Trained for long on a single sequence, so that the model would quote it."""
    options = [
        "preset=debug", "trainer.epochs=60", "optimizer.lr=1e-2", "dataset.n_train=1",
        "trainer.batch_size=1",
    ]  # fmt: skip
    for name, more in (("free", []), ("blocked", BLOCKED)):
        result = hyperfit(done, *options, f"hydra.run.dir={name}", *more)
        assert result.returncode == 0, result.stderr
    free, blocked = record(done / "free"), record(done / "blocked")
    assert free.overall.tuned["gen/dataset_overlap"].mean > 2
    assert max(blocked.per_text.tuned["gen/dataset_overlap"]) <= 2
    assert blocked.overall.base == free.overall.base
    none = hyperfit(done, "preset=debug", "hydra.run.dir=none_blocked", "tuning=none", *BLOCKED)
    assert none.returncode == 0, none.stderr
    assert "the base model has no training data to quote" in none.stdout
    assert record(done / "none_blocked").overall.tuned == record(done / "run").overall.base


def test_the_base_model_and_the_early_stopped_checkpoint_are_runs_too(done: Path) -> None:
    result = hyperfit(done, "preset=debug", "hydra.run.dir=none", "tuning=none")
    assert result.returncode == 0, result.stderr
    none = record(done / "none")
    assert none.overall.tuned == none.overall.base == record(done / "run").overall.base
    assert none.history == []
    result = hyperfit(done, "preset=debug", "hydra.run.dir=best", "evaluation.checkpoint=best_val")
    assert result.returncode == 0, result.stderr
    assert record(done / "best").history == record(done / "run").history


def test_damaged_artifacts_are_built_again_with_the_same_numbers(
    done: Path, tmp_path: Path
) -> None:
    """One file of every artifact is damaged, between two runs of the same command."""
    shutil.copytree(done / "outputs", tmp_path / "outputs")
    store = tmp_path / "outputs/store"
    folders = [path.parent for path in store.glob("*/*/manifest.json")]
    kinds = {folder.parent.name for folder in folders}
    assert {"documents", "sequences", "tuned", "validation", "continuations"} <= kinds
    for folder in folders:
        victim = next(
            p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"
        )
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    result = hyperfit(tmp_path, *DEBUG)
    assert result.returncode == 0, result.stderr
    assert numbers(tmp_path / "run") == numbers(done / "run")


def test_a_fresh_store_gives_the_same_numbers(done: Path, tmp_path: Path) -> None:
    assert hyperfit(tmp_path, *DEBUG).returncode == 0
    assert numbers(tmp_path / "run") == numbers(done / "run")


LONGER = [*DEBUG, "trainer.epochs=6", "evaluation.max_new_tokens=[64]", "dataset.n_train=40"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the longer run has ended."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hyperfit(folder, *LONGER).returncode == 0
    return folder


def test_kill_9_at_any_moment_ends_with_bit_identical_numbers(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Moments of progress, not of the clock: a shared machine may be twice as fast soon after."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 10**6)  # other moments in every run
    print(f"KILL_SEED={seed}")  # shown when the test fails: repeats it
    chance = random.Random(seed)
    files = len(below(undisturbed / "outputs/store"))
    moments = sorted((chance.uniform(0.1, 0.75) * files, chance.uniform(0, 0.3)) for _ in range(3))
    for reached, later in moments:
        process = subprocess.Popen(
            command(*LONGER), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and len(below(tmp_path / "outputs/store")) < reached:
            time.sleep(0.002)
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, moments
    assert hyperfit(tmp_path, *LONGER).returncode == 0, moments
    assert numbers(tmp_path / "run") == numbers(undisturbed / "run"), moments
    assert not below(tmp_path / "outputs/store", "*.partial")


def test_kill_9_in_each_phase_ends_with_bit_identical_numbers(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Aimed kills: as soon as a sign of training, of writing and of generation is on the disk."""
    signs = [
        "tuned/*.partial/checkpoint-*.pt",
        "tuned/*.partial/last.safetensors",
        "continuations/*.partial",
    ]
    for sign in signs:
        process = subprocess.Popen(
            command(*LONGER), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not below(tmp_path / "outputs/store", sign):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "run/results.json").exists()
    assert hyperfit(tmp_path, *LONGER).returncode == 0
    assert numbers(tmp_path / "run") == numbers(undisturbed / "run")


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    result = hyperfit(
        tmp_path, "-m", "preset=debug", "tracking=offline", "hydra.sweep.dir=sweep",
        "seed=0,1", "optimizer.lr=1e-3,1e30",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    runs = sorted((tmp_path / "sweep").glob("seed=*"))
    assert len(runs) == 4
    finished = [p for p in runs if (p / "results.json").exists()]
    assert [p for p in runs if "lr=1e+30" in p.name] == [p for p in runs if p not in finished]
    tracked = [path.name for run in runs for path in (run / "wandb").glob("offline-run-*")]
    assert len(tracked) == len(set(tracked)) == 4  # each run has one of its own
    as_it_fails, at_the_end = result.stderr.split("2 runs finished, 2 failed:")
    for text in (as_it_fails, at_the_end):
        assert text.count("training diverged in epoch 1") == 2
        assert text.count("lr=1e+30") >= 2
    assert as_it_fails.count("failed: ") == 2


def test_the_default_run_opens_no_connection(tmp_path: Path) -> None:
    code = f"""
import sys, socket
seen = []
def hook(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        seen.append(arguments[1])
    elif event == "socket.getaddrinfo":
        seen.append(arguments[0])
sys.addaudithook(hook)
sys.argv = ["hyperfit", *{DEBUG!r}, "tracking=offline"]
from hyperfitting.run import main
try: main()
finally: print("CONNECTIONS", [a for a in seen if "127.0.0.1" not in str(a)])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=True, timeout=300,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "CONNECTIONS []"


def test_a_full_disk_is_reported_and_finished_artifacts_are_kept(
    tmp_path: Path, done: Path
) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        result = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert result.returncode == 1
        assert "no space left on the disk" in result.stderr
        assert "Traceback" not in result.stderr
        finished = {p.parent.name for p in disk.rglob("manifest.json")}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert again.returncode == 0, again.stderr
        assert finished <= {p.parent.name for p in disk.rglob("manifest.json")}
        expected = numbers(done / "run")
        expected["config"]["store"] = str(disk)
        assert numbers(tmp_path / "run") == expected


def test_out_of_memory_names_what_to_lower(tmp_path: Path) -> None:
    code = f"""
import resource, sys
import torch, transformers
from hyperfitting.training import train
def train_step(*a):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    return torch.zeros(1 << 30).sum().item()  # a real allocation that really fails
train.train_step = train_step
sys.argv = ["hyperfit", *{DEBUG!r}]
from hyperfitting.run import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert "out of memory" in result.stderr
    assert "hardware.micro_batch_size" in result.stderr


def test_non_finite_logits_are_reported_not_scored(tmp_path: Path, base: BaseModel) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.folder(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
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
    result = hyperfit(
        tmp_path, *DEBUG, "evaluation.max_new_tokens=[1000]", "evaluation.text_len=48"
    )
    assert result.returncode == 0, result.stderr
    result_record = record(tmp_path / "run")
    assert {len(sample.tuned.tokens) for sample in result_record.samples} == {1000}
    assert "32 tokens" in result_record.notes[0]


def test_an_interrupted_run_resumes(tmp_path: Path, done: Path) -> None:
    process = subprocess.Popen(
        command(*DEBUG), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not below(tmp_path / "outputs/store", "tuned/*.partial"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in stderr
    assert hyperfit(tmp_path, *DEBUG).returncode == 0
    assert numbers(tmp_path / "run") == numbers(done / "run")
