"""Results from other machines: verified without a store, and shown as marked rows."""

import json
import shutil
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.record.files import CHECKSUMS_FILE, PREDICTIONS_FILE, RECORD_FILE, TEXTS_PAGE
from hyperfitting.reporting.community import contributions, read_contributor
from hyperfitting.reporting.report import write_report
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify import cli
from hyperfitting.verify.contribution_checks import contribution_folders
from hyperfitting.verify.result_checks import check_result
from tests.conftest import only_sweep
from tests.records import ttr_record, write_sweep
from tests.tamperings import OF_SWEEPS, Edit, edit_record, sign_again

COMMUNITY = Path(__file__).resolve().parents[1] / "docs/results/community"
WHO = "name: Ada & Co\nhardware: 8x H100\n"
REPORT = {"tables": {"t": {"rows": ["system"], "columns": {"TTR": {"key": "gen/ttr"}}}}}


def contributed(folder: Path) -> dict[str, str]:
    """Return the failed checks of a contribution, without its store, with their details."""
    groups = check_result(folder, folder / "no_store")
    checks = [check for _, group in groups for check in group]
    return {check.name: check.detail for check in checks if check.outcome == "failed"}


@pytest.fixture
def contribution(debug_sweep: Path, tmp_path: Path) -> Path:
    """A sweep of a commit, as docs/community.md describes a contribution."""
    folder = tmp_path / "community/ada"
    sweep = only_sweep(debug_sweep)
    kept = {SPEC_FILE, RECORD_FILE, PREDICTIONS_FILE, TEXTS_PAGE, CHECKSUMS_FILE}
    for path in (path for path in sweep.rglob("*") if path.name in kept):
        copied = folder / "debug" / path.relative_to(sweep)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    for run in (folder / "debug").glob("seed=*"):
        set_git(run, dirty=False)
    (folder / "who.yaml").write_text(WHO)
    return folder


def set_git(run: Path, dirty: bool) -> None:
    """Make a record one of a commit, with or without changes that were too long to keep."""
    git = {"commit": "1" * 40, "dirty": dirty, "diff_sha256": "0" * 64 if dirty else None}
    edit_record(run, lambda record: record["code"].update(git=git))
    sign_again(run)


def test_every_contribution_to_this_repository_verifies() -> None:
    failed = {folder.name: contributed(folder) for folder in contribution_folders(COMMUNITY)}
    assert not any(failed.values()), failed


def test_a_contribution_verifies_without_its_store_until_it_is_edited(contribution: Path) -> None:
    assert contributed(contribution) == {}
    edit_record(
        contribution / "debug/seed=0",
        lambda record: record["per_text"]["tuned"]["gen/ttr"].__setitem__(0, 0.9),
    )
    assert {"files", "scores"} <= contributed(contribution).keys()


@pytest.mark.parametrize("edit", OF_SWEEPS, ids=lambda edit: edit.__name__)
def test_tampering_with_a_contributed_sweep_is_found(edit: Edit, contribution: Path) -> None:
    edit(contribution / "debug")
    for run in (contribution / "debug").glob("seed=*"):
        sign_again(run)
    assert contributed(contribution).keys() == {OF_SWEEPS[edit]}


def test_a_contribution_with_uncommitted_changes_is_refused(contribution: Path) -> None:
    set_git(contribution / "debug/seed=1", dirty=True)
    expected = {"committed code": "made with uncommitted changes: debug/seed=1"}
    assert contributed(contribution) == expected


def test_a_contribution_of_another_format_is_refused(contribution: Path) -> None:
    """Its other checks cannot be made, and no table can be drawn beside it."""
    edit_record(contribution / "debug/seed=0", lambda record: record.update(schema_version=1))
    sign_again(contribution / "debug/seed=0")
    failed = contributed(contribution)
    assert failed.keys() == {"committed code"}
    assert failed["committed code"].startswith("debug/seed=0 cannot be read: ")


def test_an_incomplete_contribution_is_refused(contribution: Path) -> None:
    community = contribution.parent
    (contribution / "debug/seed=0").rename(contribution / "aside")
    assert contributed(contribution)["whole sweeps"] == (
        "without a record: debug/seed=0; runs of no sweep: aside"
    )
    (contribution / "debug" / SPEC_FILE).unlink()
    assert contributed(contribution).keys() == {"whole sweeps"}
    (contribution / "who.yaml").unlink()
    assert contributed(contribution).keys() == {"whole sweeps", "who.yaml"}
    shutil.rmtree(contribution)
    contribution.mkdir()
    assert contribution_folders(community) == [contribution]
    with pytest.raises(UserError, match="has no result"):
        contributed(contribution)


def test_the_command_checks_all_contributions_in_a_folder(
    contribution: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2: what needs the store is not checked."""
    community = contribution.parent
    command = [str(community), "--json", "--store", str(community / "no_store")]
    arguments = cli._parser().parse_args(command)
    assert cli.verify(arguments) == 2
    groups = json.loads(capsys.readouterr().out)["results"].keys()
    sweep = contribution / "debug"
    assert groups == {
        str(sweep / "seed=0"), str(sweep / "seed=1"), f"all of {sweep}",
        f"contribution {contribution}",
    }  # fmt: skip
    (community / "grace").mkdir()
    assert cli.verify(arguments) == 1


def test_rows_of_others_follow_ours_with_who_and_hardware(tmp_path: Path) -> None:
    ours, theirs = ttr_record([0.5, 0.5], 0.5), ttr_record([0.7, 0.7], 0.7)
    sweep = write_sweep(tmp_path / "sweeps/x", REPORT, {"tuned_0": ours})
    ada = tmp_path / "reports/community/ada"
    ada.mkdir(parents=True)
    other = write_sweep(ada / "x", REPORT, {"tuned_0": theirs})
    (ada / "who.yaml").write_text(WHO)
    rows = (write_report(sweep) / "t.md").read_text().splitlines()
    labels = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    cells = dict(zip(labels, (row for row in rows if row.startswith("|")), strict=True))
    mine, hers = "tuned", "tuned (by Ada & Co, 8x H100)"
    assert "0.5" in cells[mine] and "0.7" in cells[hers]
    assert labels.index(hers) > labels.index(mine)
    spec = json.loads((other / SPEC_FILE).read_text())
    (other / SPEC_FILE).write_text(json.dumps(spec | {"name": "another"}))
    assert contributions(ada.parent, read_sweep_spec(sweep)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: Ada", "hardware"),
        ("name: Ada\nhardware: x\nkey: 1", "key"),
        ("name: [Ada]\nhardware: x", "name"),
        ("name: {", "is not valid"),
        ("", "is not valid"),
        ("name: ''\nhardware: x", "name"),
    ],
)
def test_a_mistake_in_who_yaml_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "who.yaml").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_contributor(tmp_path / "who.yaml")
