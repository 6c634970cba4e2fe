"""Answers to open questions in the chat template: generated, in the record, and verified."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperfitting.data import chat
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.arrays import load_continuations
from hyperfitting.evaluation.chat import answers_step, build_chat, chat_artifacts
from hyperfitting.evaluation.chat_questions import QUESTIONS
from hyperfitting.evaluation.scoring import NgramCorpus
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import ModelState, load
from hyperfitting.progress import no_op
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.store.artifact import Store
from hyperfitting.verify.run_checks import check_run
from tests.chat import CHATML, chat_base, chat_file, tokenizer_with, without_marks
from tests.cli import hyperfit
from tests.conftest import Compose, tiny_model

__all__ = ["chat_base"]

SOME_QUESTIONS = ("Why?", "How many?", "Who?", "Where is it now?", "Who!")


def chat_setting(compose: Compose, store: Store) -> Setting:
    run = compose("preset=debug", "evaluation.chat=true", "evaluation.chat_max_new_tokens=6")
    sequences = store.artifact("sequences", version=0, config={}, inputs={})
    return Setting(run.evaluation, run.decode, run.hardware, {}, sequences, store, no_op)


def lazy(base: BaseModel) -> LazyModel:
    return LazyModel(ModelState(base), torch.device("cpu"), None)


def test_every_question_has_its_own_answer_whatever_the_lengths_of_the_others(
    chat_base: BaseModel, tmp_path: Path, store: Store, compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("hyperfitting.evaluation.chat.QUESTIONS", SOME_QUESTIONS)
    setting = chat_setting(compose, store)
    artifact = answers_step(setting, lazy(chat_base)).ensure()
    answers = json.loads(artifact.file("continuations.json").read_text("utf-8"))
    tokenizer, model = chat_base.tokenizer(), load(chat_base).eval()
    decode = replace(setting.decode, stop_at_eos=True)
    for text, answer in zip(SOME_QUESTIONS, answers, strict=True):
        prompt = np.array([chat.prompt_tokens(tokenizer, chat.question(text))], np.int32)
        alone = continue_texts(model, prompt, 6, decode)
        assert answer["tokens"] == alone.tokens[0]
        assert "".join(answer["token_texts"]) == tokenizer.decode(alone.tokens[0])


def test_the_record_holds_both_models_answers_with_their_overlap_and_values(
    chat_base: BaseModel, tmp_path: Path, store: Store, compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("hyperfitting.evaluation.chat.QUESTIONS", SOME_QUESTIONS)
    other = tiny_model(tmp_path, "gpt2")
    tokenizer_with(without_marks(CHATML)).save_pretrained(tmp_path)
    setting = chat_setting(compose, store)
    artifacts = chat_artifacts(setting, lazy(chat_base), lazy(other))
    assert artifacts is not None
    steps = {"tuned": artifacts.tuned, "base": artifacts.base}
    tokens = {
        side: [text["tokens"] for text in load_continuations(step.ensure())]
        for side, step in steps.items()
    }
    quoted = tokens["tuned"][1][1:5]
    built = build_chat(
        artifacts, NgramCorpus(np.array([quoted], np.int32), None), setting.evaluation
    )
    assert [answer.question for answer in built.answers] == list(SOME_QUESTIONS)
    ttrs = {}
    for side in steps:
        answers = [getattr(answer, side) for answer in built.answers]
        assert [answer.tokens for answer in answers] == tokens[side]
        for answer in answers:
            assert answer.text == "".join(answer.token_texts)
            runs = [
                n
                for n in range(1, 5)
                for i in range(len(answer.tokens) - n + 1)
                for j in range(len(quoted) - n + 1)
                if answer.tokens[i : i + n] == quoted[j : j + n]
            ]
            assert answer.overlap.length == max(runs, default=0)
        ttrs[side] = np.array([len(set(of_text)) / len(of_text) for of_text in tokens[side]])
        assert built.per_text[side]["gen/ttr"] == pytest.approx(ttrs[side].tolist())
        assert built.per_text[side]["gen/n_tokens"] == [len(t) for t in tokens[side]]
        assert getattr(built, side)["gen/ttr"].mean == pytest.approx(ttrs[side].mean())
    assert built.answers[1].tuned.overlap.length == 4
    difference = built.difference["gen/ttr"]
    assert difference.mean == pytest.approx((ttrs["tuned"] - ttrs["base"]).mean())


@pytest.fixture(scope="module")
def answered_run(chat_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on conversations that answered questions."""
    folder = tmp_path_factory.mktemp("answered")
    result = hyperfit(
        folder, "preset=debug", "model=local", f"model.path={chat_base.folder()}",
        "dataset=files", f"dataset.path={chat_file(folder)}", "dataset.chat=true",
        "dataset.text_field=messages", "evaluation.chat=true",
        "evaluation.chat_max_new_tokens=8", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.slow
def test_an_edited_answer_does_not_pass_verification(answered_run: Path, tmp_path: Path) -> None:
    def failed() -> set[str]:
        return {check.name for check in check_run(run) if check.outcome == "failed"}

    run = shutil.copytree(answered_run, tmp_path / "run")
    assert failed() == set()
    path = run / RECORD_FILE
    record = json.loads(path.read_text("utf-8"))
    record["chat"]["answers"][0]["tuned"]["text"] = "Much better."
    path.write_text(json.dumps(record), "utf-8")
    assert {"files", "texts", "record from artifacts"} <= failed()


@pytest.mark.slow
def test_a_run_on_conversations_records_both_models_answers(answered_run: Path) -> None:
    record = read_record(answered_run / RECORD_FILE)
    assert record.chat is not None
    assert [answer.question for answer in record.chat.answers] == list(QUESTIONS)
    part = record.slice_at(dataset="chat")
    assert part is not None
    assert record.slice_at(8, "chat") == part
    assert record.slice_at(9, "chat") is None
    for side in ("tuned", "base"):
        artifact = Path(record.artifacts[f"chat/{side}"]) / "continuations.json"
        answers = [a["tokens"] for a in json.loads(artifact.read_text("utf-8"))]
        ttr = np.mean([len(set(tokens)) / len(tokens) for tokens in answers])
        estimate = record.estimate(part, side, "gen/ttr")
        assert estimate is not None
        assert estimate.mean == pytest.approx(ttr)
        assert part.estimates(side)["gen/n_tokens"].mean == np.mean([len(a) for a in answers])
    assert "gen/ttr" in part.difference
