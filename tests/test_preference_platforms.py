"""Annotation platforms and a judge's server for real, over loopback, in environments of their own.

What is entered there, by the platform's API and in a browser, is what is imported.
"""

import http.cookiejar
import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from hyperfitting.models.base import BaseModel
from hyperfitting.preference.exchange import export_task, import_answers
from hyperfitting.preference.items import CHOICES, Choice, Task, read_task, resolve, write_task
from hyperfitting.preference.judge_report import read_judge_file
from hyperfitting.preference.judgments import Judgment
from tests.awkward_study import awkward_task, make_item, make_task
from tests.own_environment import CHECKOUT, free_port, program, running

pytestmark = pytest.mark.server  # installs the servers
TOKEN, PASSWORD = "0123456789abcdef0123456789abcdef01234567", "correct-horse-7"
SLOW = 300_000  # ms


class LabelStudio:
    """The API of a Label Studio that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data)
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Token {TOKEN}")
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read() or b"null")

    def make_project(self, folder: Path, annotator: str) -> int:
        """Make an annotator's project of an export; return its id."""
        fields = {
            "title": annotator,
            "label_config": (folder / "labeling_config.xml").read_text("utf-8"),
            "expert_instruction": (folder / "instructions.txt").read_text("utf-8"),
        }
        project = int(self.call("/api/projects", fields)["id"])
        tasks = json.loads((folder / f"{annotator}.json").read_text("utf-8"))
        assert self.call(f"/api/projects/{project}/import", tasks)["task_count"] == len(tasks)
        return project

    def export(self, project: int, path: Path) -> Path:
        tasks = self.call(f"/api/projects/{project}/export?exportType=JSON")
        path.write_text(json.dumps(tasks), "utf-8")
        return path


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    folder, port = tmp_path_factory.mktemp("label-studio"), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(program("label-studio", "label-studio==1.23.2")), "start", "--no-browser",
        "--internal-host", "127.0.0.1", "-p", str(port), "--data-dir", str(folder),
        "--username", "alice@example.com", "--password", PASSWORD,
        "--user-token", TOKEN, "--enable-legacy-api-token",
    ]  # fmt: skip
    quiet = {"collect_analytics": "0", "LATEST_VERSION_CHECK": "0", "SENTRY_DSN": ""}
    with running(command, folder, f"{url}/health", **quiet):
        yield LabelStudio(url)


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Task]:
    write_task(tmp_path, awkward_task(aspects=("fluency",)))
    return tmp_path, read_task(tmp_path)


def choices_of(judgments: list[Judgment]) -> dict[tuple[str, str], Choice]:
    return {(judgment.annotator, judgment.item): judgment.choice for judgment in judgments}


def test_what_is_entered_in_label_studio_by_its_api_is_imported(
    label_studio: LabelStudio, study: tuple[Path, Task]
) -> None:
    folder, task = study
    export_task(task, "label-studio", folder / "out")
    project = label_studio.make_project(folder / "out", "alice")
    query = f"/api/tasks?project={project}&page_size=100"
    entered = {}
    for number, row in enumerate(label_studio.call(query)["tasks"]):
        shown = CHOICES["p1"][number % 3]
        result = [
            {"from_name": name, "to_name": "context", "type": "choices", "value": {"choices": [c]}}
            for name, c in (("preference", shown), ("fluency", "right"))
        ]
        body = {"result": result, "lead_time": 3.5}
        label_studio.call(f"/api/tasks/{row['id']}/annotations", body)
        item = task.item(row["data"]["item"])
        assert item is not None
        entered["alice", item.id] = resolve(shown, task.left("alice", item))
    path = label_studio.export(project, folder / "export.json")
    accepted, left_out = import_answers(folder, "label-studio", [path])
    assert left_out == []
    assert choices_of(accepted) == entered
    assert len(entered) == len(task.items)
    for judgment in accepted:
        assert judgment.aspects == {"fluency": resolve("right", judgment.left)}
        assert judgment.seconds == 3.5


def test_what_is_entered_in_label_studio_in_a_browser_is_imported(
    label_studio: LabelStudio, study: tuple[Path, Task],
    browser: Browser,
) -> None:  # fmt: skip
    folder, _ = study
    items = [make_item(n, f"<b>one</b> {n}", f"two {n}") for n in range(3)]
    task = make_task(items, ("bob",))
    (folder / "task.json").unlink()
    write_task(folder, task)
    export_task(task, "label-studio", folder / "out")
    project = label_studio.make_project(folder / "out", "bob")
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(SLOW)
    page.goto(f"{label_studio.url}/user/signup")
    page.fill("input[name=email]", "bob@example.com")
    page.fill("input[name=password]", PASSWORD)
    page.locator("form [type=submit]").first.click()
    page.wait_for_load_state()
    page.goto(f"{label_studio.url}/projects/{project}/data?labeling=1", wait_until="commit")
    for number, words in enumerate(("I prefer A", "Equally good", "I prefer B")):
        page.get_by_text(f"It was {number}", exact=True).wait_for()
        page.get_by_text(words).first.click()
        with page.expect_response(lambda r: "/annotations" in r.url and r.status == 201):
            page.get_by_role("button", name="Submit current annotation").click()
    page.close()
    path = label_studio.export(project, folder / "export.json")
    accepted, left_out = import_answers(folder, "label-studio", [path])
    assert left_out == []
    assert [judgment.shown for judgment in accepted] == ["left", "equal", "right"]
    assert [judgment.item for judgment in accepted] == [item.id for item in items]


def test_what_is_entered_in_potato_is_imported(study: tuple[Path, Task]) -> None:
    folder, task = study
    export_task(task, "potato", folder / "out")
    port = free_port()
    potato = program("potato", "potato-annotation==2.12.1")
    command = [str(potato), "start", "config.yaml", "-p", str(port), "--host", "127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    entered = {}
    with running(command, folder / "out", f"{url}/health"):
        opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        )
        login = urllib.parse.urlencode({"email": "bob", "pass": "", "action": "login"}).encode()
        opener.open(f"{url}/auth", login, timeout=60)
        for number in range(len(task.items)):
            with opener.open(f"{url}/api/current_instance", timeout=60) as answer:
                instance = json.loads(answer.read())
            shown = CHOICES["p1"][number % 3]
            send(opener, f"{url}/updateinstance", {
                "instance_id": instance["instance_id"], "span_annotations": [],
                "annotations": {f"preference:{shown}": shown, "fluency:left": "left"},
            })  # fmt: skip
            step = {"action": "next_instance", "instance_id": instance["instance_id"]}
            send(opener, f"{url}/annotate", step)
            item = task.item(instance["data"]["item"])
            assert item is not None
            entered["bob", item.id] = resolve(shown, task.left("bob", item))
    accepted, left_out = import_answers(folder, "potato", [folder / "out"])
    assert left_out == []
    assert choices_of(accepted) == entered
    assert len(entered) == len(task.items)


def send(opener: urllib.request.OpenerDirector, url: str, body: Any) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    opener.open(request, timeout=60).close()


def test_transformers_serve_of_a_random_model_is_a_judge_that_says_nothing(
    base: BaseModel, tmp_path: Path
) -> None:
    # FastAPI is all that `transformers serve` needs beyond this project's packages
    packages = CHECKOUT / ".venv-transformers-serve"
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(packages), "fastapi", "annotated-doc"], check=True)
    task = make_task([make_item(0, "one", "two")])
    write_task(tmp_path, task)
    tokenizer = base.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    port, model = free_port(), str(shutil.copytree(base.folder(), tmp_path / "model"))
    tokenizer.save_pretrained(model)
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", model,
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]  # fmt: skip
    url, offline = f"http://127.0.0.1:{port}", {"HF_HUB_OFFLINE": "1"}
    with running(command, tmp_path, f"{url}/health", PYTHONPATH=str(packages), **offline):
        ask = ["judge", str(tmp_path), "--model", model, "--name", "random", "--max-tokens", "8"]
        asked = subprocess.run(
            [sys.executable, "-m", "hyperfitting.preference.cli", *ask, "--base-url", f"{url}/v1"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
    assert "no ranking" in asked.stdout
    written = read_judge_file(tmp_path)
    assert written is not None
    report = written.judges["random"]
    assert report.usage is not None
    assert (report.usage.questions, report.usage.invalid) == (2, 2)
    assert not report.reliable
