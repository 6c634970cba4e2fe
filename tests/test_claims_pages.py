"""The pages of the ledger of claims, and which sweeps and seeds they are of."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from hyperfitting.record.schema import Timings
from hyperfitting.reporting.claims.experiments import Part, parts_showing
from hyperfitting.reporting.claims.ledger import Ledger, build_ledger
from hyperfitting.reporting.claims.render import markdown, write_page
from hyperfitting.reporting.claims.schema import SCALES, Quantity, read_claims
from hyperfitting.reporting.claims.sweeps import CountedSweep, Sweeps, load_sweeps
from hyperfitting.reporting.cli import main
from hyperfitting.reporting.index import write_index
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.serve import update_claims
from hyperfitting.runtime.code_version import Git
from hyperfitting.sweep.spec import SPEC_FILE
from tests.browser import open_page
from tests.claims import BASE, TUNED, claim, criterion, record, several, sweeps
from tests.records import write_sweep

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_a_reading_is_shown_only_while_our_results_contradict_the_claim(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    for regions, shown in (([0.4], False), ([0.9], True), ([0.4, 0.9], True)):
        criteria = [criterion(above=above) for above in regions]
        reading = claim(criteria=criteria, reading="as few steps do")
        assert ("as few steps do" in markdown(build_ledger([reading], runs))) is shown


def test_a_page_of_a_hostile_label_has_no_script(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    hostile = "<script>alert(1)</script> | <b>"
    ledger = build_ledger([claim()], runs)
    values = json.loads(json.dumps(ledger.model_dump(mode="json")))
    values["entries"][0]["outcomes"]["embedded"]["evidence"][0]["model"] = hostile
    ledger = Ledger.model_validate(values)
    page = write_page(ledger, tmp_path).read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert "<script" not in markdown(ledger).replace(r"\<", "")


@pytest.mark.server
def test_a_browser_shows_the_claims_of_one_verdict_without_a_script(
    browser: Browser, tmp_path: Path
) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    claims = [
        claim(criteria=[criterion(above=0.4)]),
        claim(id="p1-y", claim="it is high", criteria=[criterion(above=0.9)]),
    ]
    opened = open_page(browser, write_page(build_ledger(claims, runs), tmp_path))
    rows = opened.page.locator("tbody tr:visible")
    assert rows.count() == len(claims) * len(SCALES)
    opened.page.get_by_label("not reproduced").check()
    assert ["it is high" in text for text in rows.all_inner_texts()] == [True]
    assert opened.messages == []


def test_the_command_writes_the_same_numbers_for_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path / "x", {}, several(TUNED, BASE))
    with pytest.raises(SystemExit) as done:
        main(["claims", str(tmp_path), "--to", str(tmp_path / "docs")])
    assert done.value.code == 0
    ledger = Ledger.model_validate_json((tmp_path / "docs/claims.json").read_text("utf-8"))
    assert (tmp_path / "docs/claims.md").read_text("utf-8") == markdown(ledger)
    assert "not tested" in capsys.readouterr().out


def test_an_update_keeps_numbers_whose_runs_are_not_given_and_judges_them_again(
    tmp_path: Path,
) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    high = claim(id="p1-y", criteria=[criterion(above=0.4)])
    earlier = build_ledger([claim(), high], runs)
    none = Sweeps({})
    kept = build_ledger([claim(), high], none, earlier)
    assert (earlier.kept, kept.kept) == (0, 2)
    for before, after in zip(earlier.entries, kept.entries, strict=True):
        old, new = before.outcomes["embedded"], after.outcomes["embedded"]
        assert (new.verdict, new.p, new.adjusted_p) == (old.verdict, old.p, old.adjusted_p)
        assert [item.estimate for item in new.evidence] == [i.estimate for i in old.evidence]
    assert "2 claims have numbers that were computed earlier" in markdown(kept)
    # the family of Holm's method is that of the claims there are now
    alone = build_ledger([claim()], none, earlier).entries[0].outcomes["embedded"]
    assert alone.adjusted_p == alone.p
    # another criterion is not decided by the number of the old one
    for changed in (criterion(above=0.5), criterion(value={"length": 96}, above=0.4)):
        ledger = build_ledger([claim(id="p1-y", criteria=[changed])], none, earlier)
        assert ledger.entries[0].outcomes["embedded"].verdict == "not tested"


def test_an_update_takes_the_runs_that_are_given(tmp_path: Path) -> None:
    earlier = build_ledger([claim()], sweeps(tmp_path / "x", several(TUNED, BASE)))
    runs = sweeps(tmp_path / "y", several(BASE, TUNED))
    counted = CountedSweep(experiment="table1", scale="embedded", counted="x", others=["w"])
    earlier = earlier.model_copy(update={"counted": [counted]})
    assert build_ledger([claim()], Sweeps({}), earlier).counted == [counted]
    updated = build_ledger([claim()], runs, earlier)
    assert updated == build_ledger([claim()], runs)
    assert updated.entries[0].outcomes["embedded"].verdict == "not reproduced"


def test_the_command_updates_a_ledger_and_refuses_one_of_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path / "sweeps/x", {}, several(TUNED, BASE))
    (tmp_path / "empty").mkdir()
    docs = tmp_path / "docs"

    def report(*arguments: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(["claims", *arguments, "--to", str(docs)])
        return int(done.value.code or 0)

    assert report(str(tmp_path / "empty"), "--update") != 0
    assert "--update" in capsys.readouterr().err
    assert report(str(tmp_path / "sweeps")) == 0
    path = docs / "claims.json"
    full = Ledger.model_validate_json(path.read_text("utf-8"))
    assert report(str(tmp_path / "empty"), "--update") == 0
    updated = Ledger.model_validate_json(path.read_text("utf-8"))
    assert updated.counts("embedded") == full.counts("embedded")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"version": 3}))
    before = path.read_bytes()
    assert report(str(tmp_path / "empty"), "--update") != 0
    assert "version" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_folder_that_does_not_exist_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["claims", str(tmp_path / "nowhere"), "--to", str(tmp_path)])
    assert done.value.code != 0
    error = capsys.readouterr().err
    assert "nowhere: is no folder" in error
    assert "Traceback" not in error


def test_the_dashboard_has_a_page_of_the_claims_that_is_drawn_when_a_record_is_newer(
    tmp_path: Path,
) -> None:
    (tmp_path / "sweeps").mkdir()
    assert list(update_claims(tmp_path)) == []
    assert "claims.html" not in write_index(tmp_path).read_text("utf-8")
    sweep = write_sweep(tmp_path / "sweeps/x", {}, several(TUNED, BASE))
    (tmp_path / "reports").mkdir()
    assert list(update_claims(tmp_path)) == [("claims", "")]
    assert list(update_claims(tmp_path)) == []
    assert 'href="claims.html"' in write_index(tmp_path / "reports").read_text("utf-8")
    os.utime(sweep / "tuned_0/results.json", (2e9, 2e9))
    assert list(update_claims(tmp_path)) == [("claims", "")]


def test_the_committed_page_is_of_the_committed_data_and_claims() -> None:
    ledger = Ledger.model_validate_json((DOCS / "claims.json").read_text("utf-8"))
    assert (DOCS / "claims.md").read_text("utf-8") == markdown(ledger, DOCS / "results")
    entries = [(e.id, e.source, e.claim, e.theirs, e.reading) for e in ledger.entries]
    assert entries == [(c.id, c.source, c.claim, c.theirs, c.reading) for c in read_claims()]


def test_a_number_is_linked_to_the_tables_and_figures_that_show_it(tmp_path: Path) -> None:
    (runs,) = sweeps(tmp_path / "x", several(TUNED, BASE)).runs_of.values()
    shown = criterion(value={"experiment": "figure5_right"}, above=0.4)
    ledger = build_ledger(
        [claim(criteria=[shown])], Sweeps({("figure5_right", "embedded"): list(runs)})
    )
    results = tmp_path / "results"
    assert "[x](results" not in markdown(ledger, results)
    (results / "x").mkdir(parents=True)
    for name in ("README.md", "figure5_right.md", "figure5_right.svg", "other.md"):
        (results / "x" / name).touch()
    links = "[x](results/x/README.md), [table figure5_right](results/x/figure5_right.md)"
    assert f"{links}, [figure figure5_right](results/x/figure5_right.svg) |" in markdown(
        ledger, results
    )
    (results / "x/figure5_right.svg").unlink()
    assert f"{links} |" in markdown(ledger, results)
    page = write_page(ledger, results).read_text("utf-8")
    for anchor in ("table-figure5_right", "figure-figure5_right", "texts"):
        assert f'href="x/index.html#{anchor}"' in page


def test_the_anchors_of_a_page_of_claims_are_ids_of_the_pages_of_sweeps(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "table1": {"rows": ["system"], "columns": {"TTR": {"key": "gen/ttr"}}}
    }
    figures: dict[str, Any] = {
        "bars": {"kind": "bars", "rows": "system", "y": {"TTR": {"key": "gen/ttr"}}}
    }
    report = {"tables": tables, "figures": figures}
    sweep = write_sweep(tmp_path / "sweeps/x", report, several(TUNED, BASE))
    page = (write_report(sweep) / "index.html").read_text("utf-8")
    for part in (Part("table", "table1"), Part("figure", "bars")):
        assert f'id="{part.anchor}"' in page
    assert 'id="texts"' in page


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"experiment": "seeds", "key": "gen/ttr", "epoch": 2}, ["seeds.svg"]),
        ({"experiment": "table2", "key": "gen/dataset_overlap", "statistic": "max"}, ["table2.md"]),
        ({"experiment": "figure5_left", "key": "top1_agreement"}, ["figure5_left.svg"]),
        ({"experiment": "figure9", "key": "ttr_fall_96"}, ["figure9.svg"]),
        ({"experiment": "figure6", "key": "gen/class_kept"}, ["figure6.md", "completions.svg"]),
        ({"experiment": "table1", "key": "val/loss"}, []),
    ],
)
def test_a_quantity_is_shown_where_its_own_numbers_are(
    values: dict[str, Any], parts: list[str]
) -> None:
    assert [part.file for part in parts_showing(Quantity.model_validate(values))] == parts


def _named(
    folder: Path,
    values: Sequence[float],
    finished_at: str | None,
    seeds: int = 3,
    change: str = "scale=embedded",
) -> None:
    """Write a sweep under the name of an experiment, in any folder."""
    timings = Timings(run_seconds=1.0, build_seconds={}, finished_at=finished_at)
    records = {f"tuned_{s}": record(values, BASE, s, timings=timings) for s in range(seeds)}
    sweep = write_sweep(folder, {}, records, ("hyperfit", "experiment=table1", change))
    spec = json.loads((sweep / SPEC_FILE).read_text("utf-8"))
    runs = [run for run in spec["runs"] if run["name"].startswith("tuned")]
    (sweep / SPEC_FILE).write_text(json.dumps(spec | {"name": "table1_embedded", "runs": runs}))


def test_of_several_sweeps_of_an_experiment_the_newest_complete_one_counts(tmp_path: Path) -> None:
    _named(tmp_path / "table1_embedded", [0.5] * 6, None)
    _named(tmp_path / "table1_embedded_0123", [0.6] * 6, "2026-11-02T00:00:00Z")
    _named(tmp_path / "table1_embedded_4567", [0.7] * 6, "2026-11-01T00:00:00Z")
    _named(tmp_path / "table1_embedded_89ab", [0.8] * 6, "2026-11-03T00:00:00Z", seeds=2)
    ledger = build_ledger([claim()], load_sweeps([tmp_path]))
    (item,) = ledger.entries[0].outcomes["embedded"].evidence
    assert item.value == pytest.approx(0.6)
    assert {run.partition("/")[0] for run in item.runs} == {"table1_embedded_0123"}
    others = "table1_embedded, table1_embedded_4567, table1_embedded_89ab"
    line = f"table1 at scale=embedded: table1_embedded_0123 counts, not {others}"
    assert line in markdown(ledger)
    assert line in write_page(ledger, tmp_path).read_text("utf-8")


@pytest.mark.parametrize("finished_at", [("2026-11-02T00:00:00Z", "2026-11-01T00:00:00Z"), None])
def test_copying_and_touching_the_files_of_sweeps_changes_no_verdict(
    finished_at: tuple[str, str] | None, tmp_path: Path
) -> None:
    first, second = finished_at or (None, None)  # records of earlier versions have no time
    sweeps_folder = tmp_path / "sweeps"
    _named(sweeps_folder / "table1_embedded", TUNED, first)
    _named(sweeps_folder / "table1_embedded_0123", BASE, second)
    before = build_ledger([claim()], load_sweeps([sweeps_folder]))
    assert [item.counted for item in before.counted] == ["table1_embedded"]
    copied = Path(shutil.copytree(sweeps_folder, tmp_path / "clone"))
    for name, time in (("table1_embedded", 1e9), ("table1_embedded_0123", 2e9)):
        for path in (copied / name).rglob("*"):
            os.utime(path, (time, time))
    assert build_ledger([claim()], load_sweeps([copied])) == before


@pytest.mark.parametrize(
    ("n_seeds", "remark"), [(1, "one seed: a verdict needs 3"), (3, "3 seeds")]
)
def test_every_verdict_has_its_number_of_seeds(n_seeds: int, remark: str, tmp_path: Path) -> None:
    records = {f"tuned_{seed}": record(TUNED, BASE, seed) for seed in range(n_seeds)}
    verdict = markdown(build_ledger([claim()], sweeps(tmp_path / "x", records)))
    assert f"<br>{remark} |" in verdict


def test_an_update_keeps_earlier_numbers_until_a_sweep_is_complete(tmp_path: Path) -> None:
    records = {
        f"tuned_{seed}": record(np.array(TUNED) + seed / 100, BASE, seed) for seed in range(3)
    }
    earlier = build_ledger([claim()], sweeps(tmp_path / "x", records))
    _named(tmp_path / "sweeps/a", BASE, None, seeds=1)
    updated = build_ledger([claim()], load_sweeps([tmp_path / "sweeps"]), earlier)
    (item,) = updated.entries[0].outcomes["embedded"].evidence
    assert (item.kept, item.seeds) == (True, [0, 1, 2])
    _named(tmp_path / "sweeps/b", BASE, None, seeds=3)
    updated = build_ledger([claim()], load_sweeps([tmp_path / "sweeps"]), earlier)
    (item,) = updated.entries[0].outcomes["embedded"].evidence
    assert (item.kept, item.estimate) == (False, 0.0)


def test_an_update_keeps_the_numbers_of_other_models(tmp_path: Path) -> None:
    def of_model(folder: Path, model: str) -> Sweeps:
        (runs,) = sweeps(folder, several(TUNED, BASE)).runs_of.values()
        labeled = [replace(run, labels={**run.labels, "model": model}) for run in runs]
        return Sweeps({("table1", "embedded"): labeled})

    earlier = build_ledger([claim()], of_model(tmp_path / "x", "A"))
    updated = build_ledger([claim()], of_model(tmp_path / "y", "B"), earlier)
    evidence = updated.entries[0].outcomes["embedded"].evidence
    assert [(item.model, item.kept) for item in evidence] == [("A", True), ("B", False)]


def test_a_sweep_with_other_settings_is_no_evidence_of_the_experiment(tmp_path: Path) -> None:
    _named(tmp_path / "lr", [0.1] * 6, "2026-11-03T00:00:00Z", change="optimizer.lr=1e-9")
    ledger = build_ledger([claim()], load_sweeps([tmp_path]))
    assert ledger.entries[0].outcomes["embedded"].verdict == "not tested"
    assert "table1 at scale=embedded: no sweep counts, not lr." in markdown(ledger)
    _named(tmp_path / "whole", [0.6] * 6, "2026-11-02T00:00:00Z", change="hydra.launcher.workers=2")
    ledger = build_ledger([claim()], load_sweeps([tmp_path]))
    assert "whole counts, not lr." in markdown(ledger)


def test_records_made_with_uncommitted_changes_are_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record(TUNED, BASE)
    git = Git(commit="0" * 40, dirty=True, diff_sha256=None)
    code = found.code.model_copy(update={"git": git})
    write_sweep(tmp_path / "x", {}, {"tuned_0": found.model_copy(update={"code": code})})
    cases: list[tuple[tuple[str, ...], int]] = [((), 1), (("--with-changes",), 0)]
    for more, status in cases:
        with pytest.raises(SystemExit) as done:
            main(["claims", str(tmp_path), "--to", str(tmp_path / "docs"), *more])
        assert done.value.code == status
        assert (tmp_path / "docs/claims.md").exists() == bool(more)
    assert "uncommitted changes: tuned_0" in capsys.readouterr().err
