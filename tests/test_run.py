"""The command line as users run it: from nothing to a record, killed, repeated, swept, cut off."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.models import BaseModel
from hyperfitting.reporting import glossary
from tests.conftest import below, command, environment, hyperfit, small_disk

README = Path(__file__).parents[1] / "README.md"
BLOCKED = [
    "decode.citation_blocker.enabled=true", "decode.citation_blocker.n=2",
    "decode.citation_blocker.whole_words=false",
]  # fmt: skip
DEBUG = ["preset=debug", "hydra.run.dir=run"]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def numbers(folder: Path) -> dict[str, Any]:
    """All that a repeat must give again: everything but times and places."""
    return {k: v for k, v in record(folder).items() if k not in ("timings", "git", "artefacts")}


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


def test_the_record_holds_what_the_readme_says(done: Path) -> None:
    found = record(done / "run")
    assert found["schema_version"] == 2
    assert found["config"]["trainer"]["epochs"] == 3
    assert found["config"]["dataset"]["seed"] == 0
    assert {"python", "torch", "transformers", "hyperfitting"} <= set(found["versions"])
    assert found["data"]["fingerprint"]
    documented = re.findall(r"`((?:gen|val)/[a-z0-9_]+)`", README.read_text())
    assert set(glossary.TERMS) == {*documented, "train/loss"}
    generated = {key for key in documented if key.startswith("gen/")} - {"gen/mauve"}
    assert len(generated) > 15
    for part in ("metrics", "baseline", "reference", "difference"):
        keys = generated if part == "reference" else set(documented) - {"gen/mauve"}
        assert set(found[part]) == keys
        for key, value in found[part].items():
            assert set(value) == {"mean", "ci95", "n"} | ({"p"} if part == "difference" else set())
            assert value["n"] == 4
            assert value["ci95"][0] <= value["mean"] <= value["ci95"][1], key
    for part in ("metrics", "baseline", "reference"):
        assert {len(values) for values in found["per_text"][part].values()} == {4}
        assert sum(found["overlap_histogram"][part]) == 4
        assert {len(steps) for steps in found["steps"][part].values()} == {32}
    assert [(one["set"], one["new_tokens"]) for one in found["slices"]] == [(None, 32), (None, 16)]
    assert found["slices"][0]["metrics"] == found["metrics"]
    short = [len(set(s["continuation"]["tokens"][:16])) / 16 for s in found["samples"]]
    assert found["slices"][1]["metrics"]["gen/ttr"]["mean"] == pytest.approx(sum(short) / 4)
    assert [row["epoch"] for row in found["history"]] == [1, 2, 3]
    assert {"train/loss", "val/loss", "val/entropy", "gen/ttr"} <= set(found["history"][0])
    assert len(found["samples"]) == 4
    for sample in found["samples"]:
        for side in ("continuation", "original_continuation"):
            assert len(sample[side]["tokens"]) == 32
            assert "".join(sample[side]["pieces"]) == sample[side]["text"]


def test_the_same_again_makes_nothing_and_says_the_same(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "outputs/store").rglob("*")}
    first = numbers(done / "run")
    assert hyperfit(done, *DEBUG).returncode == 0
    assert numbers(done / "run") == first
    artefacts = [p for p in (done / "outputs/store").rglob("*") if p.suffix != ".lock"]
    assert {path: path.stat().st_mtime_ns for path in artefacts} == {
        path: when for path, when in before.items() if path.suffix != ".lock"
    }


def test_another_decoding_trains_nothing_again(done: Path) -> None:
    tuned = set((done / "outputs/store/tuned").iterdir())
    result = hyperfit(done, "preset=debug", "hydra.run.dir=sampled", "decode=top_p")
    assert result.returncode == 0, result.stderr
    assert set((done / "outputs/store/tuned").iterdir()) == tuned
    assert numbers(done / "sampled")["metrics"] != numbers(done / "run")["metrics"]
    of_the_texts = [
        {k: v for k, v in record(done / name)["metrics"].items() if k.startswith("val/")}
        for name in ("sampled", "run")
    ]
    assert of_the_texts[0] == of_the_texts[1]


def test_a_blocked_member_cites_nothing_and_shares_its_baseline(done: Path) -> None:
    """Trained for long on a single sequence, so that the model would cite it."""
    options = [
        "preset=debug", "trainer.epochs=60", "optimizer.lr=1e-2", "dataset.n_train=1",
        "trainer.batch_size=1",
    ]  # fmt: skip
    for name, more in (("free", []), ("blocked", BLOCKED)):
        result = hyperfit(done, *options, f"hydra.run.dir={name}", *more)
        assert result.returncode == 0, result.stderr
    free, blocked = record(done / "free"), record(done / "blocked")
    assert free["metrics"]["gen/dataset_overlap"]["mean"] > 2
    assert max(blocked["per_text"]["metrics"]["gen/dataset_overlap"]) <= 2
    assert blocked["baseline"] == free["baseline"]
    none = hyperfit(done, "preset=debug", "hydra.run.dir=none_blocked", "tuning=none", *BLOCKED)
    assert none.returncode == 0, none.stderr
    assert "the original model has no training data to cite" in none.stdout
    assert record(done / "none_blocked")["metrics"] == record(done / "run")["baseline"]


def test_the_original_model_and_the_early_stopped_state_are_members_too(done: Path) -> None:
    result = hyperfit(done, "preset=debug", "hydra.run.dir=none", "tuning=none")
    assert result.returncode == 0, result.stderr
    none = record(done / "none")
    assert none["metrics"] == none["baseline"] == record(done / "run")["baseline"]
    assert none["history"] == []
    result = hyperfit(done, "preset=debug", "hydra.run.dir=best", "evaluation.state=best_val")
    assert result.returncode == 0, result.stderr
    assert record(done / "best")["history"] == record(done / "run")["history"]


def test_a_fresh_store_gives_the_same_numbers(done: Path, tmp_path: Path) -> None:
    assert hyperfit(tmp_path, *DEBUG).returncode == 0
    assert numbers(tmp_path / "run") == numbers(done / "run")


LONGER = [*DEBUG, "trainer.epochs=6", "evaluation.new_tokens=[64]", "dataset.n_train=40"]


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
    chance = random.Random(os.getpid())  # other moments in every run of the tests
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


def test_a_failing_member_does_not_stop_the_others(tmp_path: Path) -> None:
    result = hyperfit(
        tmp_path, "-m", "preset=debug", "tracking=offline", "hydra.sweep.dir=sweep",
        "seed=0,1", "optimizer.lr=1e-3,1e30",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    members = sorted((tmp_path / "sweep").glob("seed=*"))
    assert len(members) == 4
    finished = [p for p in members if (p / "results.json").exists()]
    assert [p for p in members if "lr=1e+30" in p.name] == [p for p in members if p not in finished]
    runs = [run.name for member in members for run in (member / "wandb").glob("offline-run-*")]
    assert len(runs) == len(set(runs)) == 4  # each member has one of its own
    at_once, at_the_end = result.stderr.split("2 members finished, 2 failed:")
    for text in (at_once, at_the_end):
        assert text.count("training diverged in epoch 1") == 2
        assert text.count("lr=1e+30") >= 2
    assert at_once.count("failed: ") == 2


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
    import sys

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=True, timeout=300,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "CONNECTIONS []"


def test_a_full_disk_is_said_and_what_was_made_is_kept(tmp_path: Path, done: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        result = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert result.returncode == 1
        assert "no space left on the disk" in result.stderr
        assert "Traceback" not in result.stderr
        made = {p.parent.name for p in disk.rglob("manifest.json")}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert again.returncode == 0, again.stderr
        assert made <= {p.parent.name for p in disk.rglob("manifest.json")}
        expected = numbers(done / "run")
        expected["config"]["store"] = str(disk)
        assert numbers(tmp_path / "run") == expected


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    code = f"""
import resource, sys
import torch, transformers
from hyperfitting.training.learner import Learner
def update(*a):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    return torch.zeros(1 << 30).sum().item()  # a real allocation that really fails
Learner.update = update
sys.argv = ["hyperfit", *{DEBUG!r}]
from hyperfitting.run import main
main()
"""
    import sys

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert "out of memory" in result.stderr
    assert "hardware.micro_batch_size" in result.stderr


def test_a_model_whose_numbers_are_nan_is_said_not_scored(tmp_path: Path, base: BaseModel) -> None:
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
    longer = ["evaluation.new_tokens=[3000]", "evaluation.text_len=48"]
    result = hyperfit(tmp_path, *DEBUG, *longer)
    assert result.returncode == 1
    assert "evaluation.context_len + evaluation.new_tokens=3016" in result.stderr
    assert "at most 2048 tokens" in result.stderr
    assert not list((tmp_path / "outputs/store").glob("tuned/*"))
    result = hyperfit(tmp_path, *DEBUG, "evaluation.new_tokens=[1000]", "evaluation.text_len=48")
    assert result.returncode == 0, result.stderr
    found = record(tmp_path / "run")
    assert {len(sample["continuation"]["tokens"]) for sample in found["samples"]} == {1000}
    assert "go on for 32 tokens only" in found["notes"][0]


def test_an_interrupted_run_says_so_and_goes_on(tmp_path: Path, done: Path) -> None:
    process = subprocess.Popen(
        command(*DEBUG), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not below(tmp_path / "outputs/store", "tuned/*.partial"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in told
    assert hyperfit(tmp_path, *DEBUG).returncode == 0
    assert numbers(tmp_path / "run") == numbers(done / "run")
