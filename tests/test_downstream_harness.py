"""lm-evaluation-harness on our models: its own numbers, no network, and what a crash loses."""

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.evaluation.downstream import harness
from hyperfitting.evaluation.downstream.results import read_answers
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.record.files import RECORD_FILE, read_record
from tests.cli import hyperfit, start
from tests.downstream import OPTIONS, local_task, question_rows


def test_a_missing_harness_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        harness.harness_version()
    assert "hyperfitting[downstream]" in str(error.value.hint)


def test_the_harness_scores_choices_by_the_models_log_likelihoods_without_network(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    connections: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load(base).eval(), base.tokenizer()
    name = "local_cloze_news"
    results = harness.evaluate(model, tokenizer, local_task(tmp_path, name), **OPTIONS)
    lines = [json.loads(harness.sample_line(s)) for s in results["samples"][name]]
    correct = []
    for row, line in zip(question_rows(name), lines, strict=True):
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["context"])["input_ids"])
            tokens = torch.tensor([tokenizer(row["context"] + choice)["input_ids"]])
            with torch.no_grad():
                log_p = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
            scores.append(log_p.gather(-1, tokens[0, start:, None]).sum().item())
        assert [value for value, _ in line["filtered_resps"]] == pytest.approx(scores, abs=1e-3)
        correct.append(int(np.argmax(scores)) == row["gold"])
    assert results["results"][name]["acc,none"] == np.mean(correct)
    assert not connections


def test_a_wrong_task_is_not_told_as_missing_data(base: BaseModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    config = local_task(tmp_path, "local_cloze_news") | {"output_type": "nonsense"}
    with pytest.raises(ValueError, match="nonsense"):
        harness.evaluate(load(base).eval(), base.tokenizer(), config, **OPTIONS)


def test_a_copy_of_the_data_without_the_subset_or_the_file_is_a_users_error(
    base: BaseModel, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    _hub_copy(tmp_path, "copy", ["present"], [{"question": "?"}])
    without_file = local_task(tmp_path, "local_cloze_news")
    (tmp_path / "local_cloze_news.jsonl").unlink()
    without_subset = without_file | {
        "dataset_path": str(tmp_path / "copy"), "dataset_name": "absent", "dataset_kwargs": {},
    }  # fmt: skip
    for config in (without_subset, without_file):
        with pytest.raises(UserError, match="not in the cache") as error:
            harness.evaluate(load(base).eval(), base.tokenizer(), config, **OPTIONS)
        assert error.value.value == "local_cloze_news"


@pytest.mark.slow
def test_generated_answers_are_extracted(base: BaseModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    name = "local_arithmetic_gen"
    model = load(base).eval()
    results = harness.evaluate(model, base.tokenizer(), local_task(tmp_path, name), **OPTIONS)
    for sample in results["samples"][name]:
        found = re.findall(r"-?\d+", sample["resps"][0][0])
        assert sample["filtered_resps"] == [found[0] if found else "[invalid]"]
        assert sample["exact_match"] == float(found[:1] == [sample["target"]])


@pytest.mark.slow
def test_unknown_tasks_and_unavailable_data_are_users_errors(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="no such task") as error:
        harness.check_tasks(["gsm8k", "gsm8"])
    assert error.value.value == "gsm8"
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache") as error:
        harness.evaluate(load(base).eval(), base.tokenizer(), "gsm8k", **OPTIONS)
    assert "hf auth login" in str(error.value.hint)


def _hub_copy(folder: Path, dataset: str, subsets: list[str], rows: list[dict[str, Any]]) -> None:
    """Write a data set as `datasets` reads it from a folder of its name, each subset alike."""
    path = folder / dataset
    path.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("test", "dev", "validation"):
        (path / f"{split}.jsonl").write_text(lines, "utf-8")
    configs = [
        {
            "config_name": subset,
            "data_files": [
                {"split": split, "path": f"{split}.jsonl"}
                for split in ("test", "dev", "validation")
            ],
        }
        for subset in subsets
    ]
    (path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", "utf-8")


@pytest.mark.slow
def test_mmlu_is_answered_in_both_forms_from_a_local_copy_without_network(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    subjects = ["abstract_algebra", "anatomy"]
    rows = [
        {"question": f" Which is {i}? ", "subject": "x", "choices": list("abcd"), "answer": i % 4}
        for i in range(6)
    ]
    _hub_copy(tmp_path, "cais/mmlu", subjects, rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    connections: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
    model = load(base).eval()
    options = OPTIONS | {"num_fewshot": 0}
    for subject in subjects:
        for name in (f"mmlu_{subject}", f"mmlu_{subject}_generative"):
            results = harness.evaluate(model, base.tokenizer(), name, **options)
            results["output_types"] = {name: results["configs"][name]["output_type"]}
            lines = [json.loads(harness.sample_line(s)) for s in results["samples"][name]]
            answers = read_answers(lines, results, name)
            assert len(answers.correct) == 6
            if name.endswith("generative"):
                assert answers.form == "generation"
                for sample, row in zip(results["samples"][name], rows, strict=True):
                    written = sample["resps"][0][0].split("\n")[0].strip()
                    assert sample["filtered_resps"][0].strip() == written
                    letter = "ABCD"[row["answer"]]
                    right = re.sub(r"[^\w\s]", "", written).lower() == letter.lower()
                    assert sample["exact_match"] == float(right)
            else:
                assert answers.form == "likelihood"
                assert answers.logits is not None
                chosen = answers.logits.argmax(1) == [row["answer"] for row in rows]
                assert answers.correct.tolist() == chosen.astype(float).tolist()
    assert not connections
    with pytest.raises(UserError, match="not in the cache") as error:
        harness.evaluate(model, base.tokenizer(), "mmlu_virology_generative", **options)
    assert "hf auth login" in str(error.value.hint)


@pytest.mark.slow
def test_a_model_spread_over_devices_scores_as_on_one(base: BaseModel, tmp_path: Path) -> None:
    """As `hardware.device_map` loads it; here its last block lies on the disk."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("lm_eval")
    model = load(base).eval()
    names = ("local_cloze_news", "local_arithmetic_gen")
    whole = {
        n: harness.evaluate(model, base.tokenizer(), local_task(tmp_path, n), **OPTIONS)
        for n in names
    }
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
        "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    spread = accelerate.dispatch_model(
        load(base).eval(), device_map, main_device="cpu", offload_dir=str(tmp_path / "disk")
    )
    for name in names:
        results = harness.evaluate(spread, base.tokenizer(), local_task(tmp_path, name), **OPTIONS)
        assert [s["filtered_resps"] for s in results["samples"][name]] == [
            s["filtered_resps"] for s in whole[name]["samples"][name]
        ]


_TASKS = "evaluation.downstream=[local_agreement,local_arithmetic,local_arithmetic_gen]"


@pytest.mark.exhaustive
def test_a_run_killed_between_tasks_keeps_the_finished_ones(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    arguments = ("preset=debug", "hydra.run.dir=run", _TASKS, "evaluation.downstream_limit=8")
    process = start(tmp_path, *arguments)
    store = tmp_path / "outputs/store/downstream"

    def finished() -> list[Path]:
        return [p for p in store.glob("*/manifest.json") if p.parent.suffix != ".partial"]

    process.wait_until(finished)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in finished()}
    result = hyperfit(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(finished()) == 6
    downstream = read_record(tmp_path / "run" / RECORD_FILE).downstream
    assert downstream is not None
    assert set(downstream.tasks) == {"local_agreement", "local_arithmetic", "local_arithmetic_gen"}
    agreement = downstream.tasks["local_agreement"]
    for score in (agreement.tuned, agreement.base):
        assert score.accuracy.mean == score.value
        assert score.accuracy.n == 8
        assert score.calibration is not None
    for name, task in downstream.tasks.items():
        assert (task.version, len(str(task.hash))) == ("1", 64)
        by_side = downstream.by_name[name]
        key = f"down/{task.form}"
        gain = by_side["tuned"][f"{key}_gain"]
        assert by_side["tuned"][key].mean == task.tuned.accuracy.mean
        assert gain.mean == pytest.approx(task.tuned.accuracy.mean - task.base.accuracy.mean)
    pooled = downstream.estimates["tuned"]["down/likelihood"]
    parts = [t.tuned.accuracy for t in downstream.tasks.values() if t.form == "likelihood"]
    assert (pooled.n, pooled.mean) == (16, np.mean([part.mean for part in parts]))
    for manifest in finished():
        (samples,) = manifest.parent.glob("samples/*.jsonl")
        lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
        assert len(lines) == 8
        assert all(line["doc_hash"] and "target" in line and line["metrics"] for line in lines)
