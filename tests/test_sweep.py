"""Sweeps: their members, what a folder says of one, and the command line, killed at any moment."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hyperfitting.config import HardwareConfig, conf_dir
from hyperfitting.errors import UserError
from hyperfitting.reporting import figures, report
from hyperfitting.reporting.sweeps import SweepRecords
from hyperfitting.results import SCHEMA_VERSION
from hyperfitting.store import Store, write_json
from hyperfitting.sweep.members import Member, axes_of, choose_scale, members, sweep_name
from hyperfitting.sweep.plan import Speeds
from hyperfitting.sweep.state import Folder, Reporter, Status
from tests.conftest import Compose, command, environment, hyperfit, small_disk

PARSER = OverridesParser.create()
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def made(axes: dict[str, Any], *given: str, always: tuple[str, ...] = ()) -> list[Member]:
    return members(always, axes_of(axes), given, PARSER)


def test_axes_make_a_product_and_names_say_what_differs() -> None:
    found = made(
        {"writer": {"original, greedy": ["tuning=none"], "hyperfitted": []}, "seed": [0, 1]},
        "trainer.epochs=3",
        always=("preset=debug", "trainer.epochs=2"),
    )
    assert [m.name for m in found] == [
        "original-greedy_seed=0", "original-greedy_seed=1",
        "hyperfitted_seed=0", "hyperfitted_seed=1",
    ]  # fmt: skip
    # the command's override takes the place of the experiment's, and the axes' come last
    assert found[0].overrides == ("preset=debug", "trainer.epochs=3", "tuning=none", "seed=0")
    assert found[3].labels == {"writer": "hyperfitted", "seed": "1"}


def test_several_values_in_the_command_are_an_axis_and_replace_the_experiments() -> None:
    found = made({"seed": [0, 1]}, "seed=5,6,7", "tuning=full,none")
    assert [m.labels for m in found] == [
        {"seed": seed, "tuning": tuning} for seed, tuning in product("567", ("full", "none"))
    ]
    assert [m.name for m in made({"seed": [0, 1]}, "seed=5")] == ["only"]


def test_what_an_experiment_fixes_cannot_be_overridden() -> None:
    axes = {"writer": {"original": ["tuning=none"]}}
    with pytest.raises(UserError, match="axis 'writer' varies") as told:
        made(axes, "tuning=full")
    assert str(told.value).startswith("tuning=full: ")
    for bad, says in (({"writer": {"a": "tuning=none"}}, "writer.a"), ({"seed": []}, "axes.seed")):
        with pytest.raises(UserError, match=says):
            made(bad)


@given(st.dictionaries(st.text(min_size=1, max_size=150), st.just([]), min_size=1, max_size=12))
def test_no_two_members_share_a_folder(options: dict[str, list[str]]) -> None:
    # labels that differ in signs alone, too long ones, ones that a file system takes for the same
    given_ = {label: [f"seed={i}"] for i, label in enumerate(options)}
    names = [m.name for m in made({"axis": given_})]
    assert len({name.lower() for name in names}) == len(options)
    for name in names:
        assert len(name) <= 120
        assert re.fullmatch(r"[\w=.+-]+", name)
        assert name not in (".", "..")


def test_the_same_sweep_has_the_same_name_whatever_does_not_matter() -> None:
    name = sweep_name(["seed=0,1", "tuning=full"])
    assert sweep_name(["tuning=full", "plan=true", "seed=0,1", "tracking=online"]) == name
    assert sweep_name(["tuning=full", "seed=0,2"]) != name
    assert len(sweep_name([f"trainer.epochs={i}" for i in range(90)])) < 120


def test_a_scale_that_does_not_exist_is_said() -> None:
    with pytest.raises(UserError, match="did you mean paper"):
        choose_scale({"embedded": {}, "paper": {}}, "papr")
    with pytest.raises(UserError, match="changes nothing without an experiment"):
        choose_scale({}, "paper")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_member_of_every_experiment_composes_and_its_report_makes_sense(
    experiment: str, compose: Compose, tmp_path: Path
) -> None:
    spec = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml"))
    assert isinstance(spec, dict)
    sweeper = spec["hydra"]["sweeper"]
    assert set(sweeper["scales"]) == {"embedded", "paper"}
    for name in ("embedded", "paper"):
        scale = choose_scale(sweeper["scales"], name)
        axes = axes_of({**(sweeper.get("axes") or {}), **scale.axes})
        found = members([*sweeper.get("always", ()), *scale.always], axes, [], PARSER)
        configs = [compose(*member.overrides) for member in found]
        assert len({json.dumps(c.__dict__, default=vars, sort_keys=True) for c in configs}) == len(
            configs
        )
        folder = tmp_path / name
        folder.mkdir()
        described = {
            "version": 1, "name": experiment, "scale": name, "command": [],
            "axes": sweeper.get("axes") or {}, "scales": sweeper["scales"],
            "report": sweeper["report"],
            "members": [{"name": m.name, "labels": m.labels} for m in found],
        }  # fmt: skip
        (folder / "sweep.json").write_text(json.dumps(described))
        assert report.write(folder).is_dir()
        rows = {h for t in (sweeper["report"].get("tables") or {}).values() for h in t["rows"]}
        assert rows <= {axis.name for axis in axes}


def test_of_two_processes_one_may_run_a_member(tmp_path: Path) -> None:
    place = Folder(tmp_path / "m")
    assert not place.is_held()
    with place.claimed() as mine:
        assert mine
        code = f"""
from pathlib import Path
from hyperfitting.sweep.state import Folder
with Folder(Path({str(place.path)!r})).claimed() as mine: print(mine)
"""
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == "False"
    assert not place.is_held()


def test_a_members_folder_says_how_far_it_is(tmp_path: Path) -> None:
    place = Folder(tmp_path / "m")
    assert place.status() == Status()
    with place.claimed():
        reporter = Reporter(place)
        with reporter.progress("training", 10, "tokens") as advance:
            advance(4, loss=1.5)
            advance(2, loss=0.5)
            said = place.said()
            assert (said.kind, said.task, said.total) == ("running", "training", 10)
        reporter.failed("too hot")
        assert place.said().reason == "too hot"
    place.say(Status("running"))
    assert place.status().kind == "interrupted"  # nobody holds it
    (place.path / "status.json").write_text("{half")
    assert place.status() == Status()


def test_the_time_of_work_is_told_from_work_of_its_size(tmp_path: Path) -> None:

    store = Store(tmp_path)

    def artefact(name: str, work: float) -> Any:
        return store.artefact(
            "tuned", version=1, config={"n": name}, inputs={}, work=lambda: work,
            make=lambda folder: (folder / "x").write_text(name) and None,
        )  # fmt: skip

    for name, work, seconds in (("a", 1e3, 1.0), ("b", 1e9, 10.0), ("c", 2e9, 10.0)):
        one = artefact(name, work)
        one.ensure()
        manifest = json.loads((one.folder / "manifest.json").read_text())
        assert manifest["work"] == work
        (one.folder / "manifest.json").write_text(json.dumps(manifest | {"seconds": seconds}))
    speeds = Speeds(tmp_path, HardwareConfig(device="cpu"))
    assert speeds.seconds(artefact("d", 3e9)) == pytest.approx(3e9 / 1.5e8)
    assert speeds.seconds(artefact("e", 2e3)) == pytest.approx(2.0)
    assert 0 < speeds.seconds(artefact("f", 1e14)) < 1e9  # nothing like it: by a matrix product


SWEEP = ["-m", "preset=debug", "evaluation.top_tokens=3", "seed=0,1", "decode=greedy,top_p"]
NAMES = [f"seed={s}_decode={d}" for s in (0, 1) for d in ("greedy", "top_p")]


def numbers(folder: Path) -> dict[str, Any]:
    """All that a repeat must give again, by member."""
    return {
        path.parent.name: {
            k: v
            for k, v in json.loads(path.read_text()).items()
            if k not in ("timings", "git", "artefacts", "config")
        }
        for path in sorted(folder.glob("*/results.json"))
    }


def only(folder: Path) -> Path:
    """The one sweep in a working folder."""
    (found,) = (folder / "outputs/sweeps").iterdir()
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    result = hyperfit(folder, *SWEEP, "hydra.launcher.workers=2")
    assert result.returncode == 0, result.stderr
    for name in NAMES:
        assert f"{name} has finished" in result.stdout
    return folder


def test_a_sweep_ends_with_a_record_a_member_and_a_report(done: Path) -> None:
    assert sorted(numbers(only(done))) == sorted(NAMES)
    assert len(list((done / "outputs/store/tuned").glob("*/manifest.json"))) == 2  # one a seed
    out = done / "outputs/reports" / only(done).name
    table = (out / "members.md").read_text()
    found = json.loads((only(done) / NAMES[0] / "results.json").read_text())
    assert f"{found['metrics']['gen/ttr']['mean']:.3f}" in table
    assert len(list(SweepRecords.of(only(done)).finished())) == 4


FIGURES: dict[str, dict[str, Any]] = {
    "curves": {"series": ["train/loss", "gen/ttr"], "lines": "seed"},
    "against": {"x": "seed", "y": {"TTR": {"key": "gen/ttr"}}, "lines": "decode"},
    "bars": {"rows": "decode", "y": {"TTR": {"key": "gen/ttr"}, "@1": {"key": "val/top1_mass"}}},
    "histogram": {"lines": "decode"},
    "along": {"series": ["gen/entropy"], "lines": "decode", "window": 4},
    "agreement": {"axis": "seed"},
    "ranks": {"lines": "seed"},
    "distributions": {"texts": "news_sample"},
    "text": {"rows": "decode", "number": 1},
}


def drawn(done: Path, to: Path, wanted: dict[str, dict[str, Any]]) -> Path:
    """Draw other figures of a sweep that has ended."""
    spec = json.loads((only(done) / "sweep.json").read_text())
    folder = to / only(done).name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(spec | {"report": {"figures": wanted}}))
    for member in only(done).glob("*/results.json"):
        (folder / member.parent.name).symlink_to(member.parent)
    return report.write(folder, to / "reports")


def test_every_kind_of_figure_is_drawn_the_same_every_time(done: Path, tmp_path: Path) -> None:
    wanted = {kind: {"kind": kind} | fields for kind, fields in FIGURES.items()}
    assert set(wanted) == set(figures._KINDS)
    first, second = (drawn(done, tmp_path / name, wanted) for name in ("a", "b"))
    for kind in wanted:
        assert (first / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        for suffix in ("svg", "png"):
            same = [(out / f"{kind}.{suffix}").read_bytes() for out in (first, second)]
            assert same[0] == same[1], kind
    labels = (first / "curves.svg").read_text()
    assert "training loss, nats" in labels
    assert "epoch" in labels


def test_a_figure_that_makes_no_sense_or_has_no_data_is_said(done: Path, tmp_path: Path) -> None:
    for wrong, says in (
        ({"kind": "curve"}, "did you mean curves"),
        ({"kind": "curves", "serie": []}, "did you mean series"),
        ({"kind": "agreement", "axis": "seeds"}, "no such axis"),
    ):
        with pytest.raises(UserError, match=says):
            drawn(done, tmp_path / says[-5:], {"x": wrong})
    out = drawn(done, tmp_path / "no", {"x": {"kind": "distributions", "texts": "poems"}})
    assert "whose poems are in the store" in (out / "README.md").read_text()
    assert not (out / "x.svg").exists()


def test_the_same_command_again_runs_nothing(done: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in only(done).rglob("*") if p.name != "sweep.json"}
    plan = hyperfit(done, *SWEEP, "plan=true")
    assert plan.stdout.count("nothing: finished") == 4
    again = hyperfit(done, *SWEEP)
    assert again.returncode == 0
    assert "has finished" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    more = hyperfit(
        done, *SWEEP[:-1], "decode=greedy,top_p,min_p", f"hydra.sweep.dir='{only(done)}'"
    )
    assert more.stdout.count("has finished") == 2  # the new members alone


def test_a_field_that_a_record_is_too_old_to_have_counts_as_its_default(
    compose: Compose, tmp_path: Path
) -> None:
    cfg, folder = compose("preset=debug"), Folder(tmp_path)
    old = json.loads(json.dumps(asdict(cfg)))
    del old["trainer"]["look_every"], old["evaluation"]["new_tokens"], old["decode"]["top_p"]
    old["tracking"], old["hardware"] = {}, {"gone": 1}

    def differs(**more: object) -> str | None:
        write_json(folder.record, {"schema_version": SCHEMA_VERSION, "config": old | more})
        return folder.outdated(cfg)

    cfg.evaluation.new_tokens = [96, 224]
    assert differs() == ""
    assert differs(gone=1) == "of another config (changed: gone)"
    cfg.trainer.look_every = 2
    assert differs() == "of another config (changed: trainer.look_every)"
    cfg.evaluation.new_tokens, cfg.decode.citation_blocker.enabled = [8], True
    assert str(differs()).count(",") == 2


def test_a_member_whose_config_changed_is_set_aside_and_runs_again(
    done: Path, tmp_path: Path
) -> None:
    sweep = ["-m", "preset=debug", "seed=0,1", f"store={done / 'outputs/store'}"]
    place = ["hydra.sweep.dir=here"]
    assert hyperfit(tmp_path, *sweep, *place).returncode == 0
    changed = hyperfit(tmp_path, *sweep, "evaluation.n_texts=3", *place)
    assert changed.returncode == 0
    said = " ".join(changed.stdout.split())
    assert said.count("of another config (changed: evaluation.n_texts)") == 2
    for seed in (0, 1):
        kept = tmp_path / "here" / f"seed={seed}" / "results.before-1.json"
        assert json.loads(kept.read_text())["config"]["evaluation"]["n_texts"] == 4
    old = tmp_path / "here" / "seed=0" / "results.json"
    old.write_text(json.dumps({"schema_version": SCHEMA_VERSION - 1}))
    again = hyperfit(tmp_path, *sweep, "evaluation.n_texts=3", *place)
    assert "another version of this software" in " ".join(again.stdout.split())
    assert again.stdout.count("has finished") == 1


def test_a_failed_member_is_tried_again_or_not(tmp_path: Path) -> None:
    sweep = ["-m", "preset=debug", "seed=0,1", "optimizer.lr=1e-3,1e30"]
    first = hyperfit(tmp_path, *sweep)
    assert first.returncode == 1
    for extra, times in (([], 2), (["hydra.sweeper.retry_failed=false"], 0)):
        again = hyperfit(tmp_path, *sweep, *extra)
        assert again.returncode == 1
        at_once, _, at_the_end = again.stderr.partition("2 members finished, 2 failed:")
        assert at_once.count("failed: training diverged") == times
        assert at_the_end.count("training diverged in epoch 1") == 2


def begun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def status_of(folder: Path, name: str) -> Status:
    found = list((folder / "outputs/sweeps").glob(f"*/{name}"))
    return Folder(found[0]).said() if found else Status()


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_that_is_killed_is_begun_again_and_given_up_in_the_end(tmp_path: Path) -> None:
    process = begun(tmp_path, "-m", "preset=debug", "trainer.epochs=100000")
    dead: set[int] = set()
    for _ in range(3):
        wait_for(lambda: status_of(tmp_path, "only").pid not in {0, *dead})
        wait_for(lambda: status_of(tmp_path, "only").task == "training")
        dead.add(pid := status_of(tmp_path, "only").pid)
        os.kill(pid, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "its process died 3 times" in told
    assert "while training" in told


def test_workers_die_with_the_launcher(tmp_path: Path) -> None:
    process = begun(tmp_path, "-m", "preset=debug", "trainer.epochs=100000")
    wait_for(lambda: status_of(tmp_path, "only").task == "training")
    pid = status_of(tmp_path, "only").pid
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10)


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path) -> None:
    process = begun(tmp_path, "-m", "preset=debug", "trainer.epochs=100000")
    wait_for(lambda: status_of(tmp_path, "only").task == "training")
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert "Traceback" not in told


TWELVE = [
    "-m", "preset=debug", "seed=0,1,2", "decode=greedy,top_p", "dataset.n_train=8,4",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("twelve")
    assert hyperfit(folder, *TWELVE).returncode == 0
    found = numbers(only(folder))
    assert len(found) == 12
    return found


def test_two_launchers_share_the_work(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    both = [begun(tmp_path, *TWELVE) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert numbers(only(tmp_path)) == undisturbed
    # each member was begun by one of them, once
    sweep = only(tmp_path)
    assert {Folder(p.parent).said().attempts for p in sweep.glob("*/status.json")} == {1}
    assert all("finished" in out for out, _ in told)


def test_a_full_disk_costs_nothing_that_was_made(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "6m") as disk:
        full = hyperfit(disk, *TWELVE)
        assert full.returncode == 1
        assert "no space left on the disk" in full.stderr
        assert "Traceback" not in full.stdout + full.stderr
        made = set((disk / "outputs/store").glob("*/*/manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        again = hyperfit(disk, *TWELVE)
        assert again.returncode == 0, again.stderr
        assert numbers(only(disk)) == undisturbed
        assert made <= set((disk / "outputs/store").glob("*/*/manifest.json"))


@pytest.mark.slow
def test_killed_at_twenty_moments_a_sweep_ends_with_the_same_records(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    moments = random.Random(7)
    for _ in range(20):
        process = begun(tmp_path, *TWELVE)
        time.sleep(moments.uniform(3, 9))  # past the start of Python, or only that would be killed
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    last = hyperfit(tmp_path, *TWELVE)
    assert last.returncode == 0, last.stderr
    assert numbers(only(tmp_path)) == undisturbed


def test_a_member_that_never_began_can_be_given_up(tmp_path: Path) -> None:
    """Its launcher may have failed before it had a folder; else the sweep would launch for ever."""
    Folder(tmp_path / "sweep" / "seed=0").give_up(3)
    status = Folder(tmp_path / "sweep" / "seed=0").status()
    assert status.kind == "failed"
    assert "died 3 times, last while beginning" in status.reason
