"""lm-evaluation-harness (EleutherAI) on a model in memory: one task, its scores and its samples."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperfitting.errors import UserError, near_matches
from hyperfitting.evaluation.downstream import local_tasks
from hyperfitting.formatting import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIELD = "evaluation.downstream"

log = logging.getLogger(__name__)


def harness_version() -> str:
    """Return the installed version of the harness.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the package lm_eval, which runs the tasks, is not installed",
            field=_FIELD,
            value="on",
            hint="pip install 'hyperfitting[downstream]', or evaluation.downstream=[]",
        )
    return importlib.metadata.version("lm_eval")


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse the name of a task that does not exist.

    Raises:
        UserError: neither the harness nor we have a task or group of that name.
    """
    known = local_tasks.names()
    if any(task not in known for task in tasks):
        known += _task_manager(defaults=True).all_tasks  # reads all task files: seconds
    for task in tasks:
        if task not in known:
            raise UserError(
                "no such task",
                field=_FIELD,
                value=task,
                valid=f"{', '.join(local_tasks.names()[:4])}, …, or a task or group of lm_eval "
                "(`lm-eval ls tasks`)",
                hint=near_matches(task, known),
            )


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str | Mapping[str, Any],
    *,
    batch_size: int | str,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
) -> dict[str, Any]:
    """Return the harness's results of one task or group, as `lm_eval --log_samples` has them.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        task: name, or the task itself.
        batch_size: questions per forward pass; `auto` finds it by the free GPU memory.
        num_fewshot: solved examples in the prompt; none: the task's own number.
        limit: questions per task; none: all.
        apply_chat_template: whether prompts are chats.

    Raises:
        UserError: the task's data can be had neither from the cache nor from the Hub.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _no_environment_report():
        manager = _task_manager(defaults=isinstance(task, str))
        _load_data(manager, task)
        lm = HFLM(pretrained=model, tokenizer=with_eos(tokenizer), batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[task if isinstance(task, str) else dict(task)],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
        )
    return dict(results)


def task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of a task's samples: `task_hashes` in the files of the command line."""
    from lm_eval.utils import hash_string

    parts = (s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    return str(hash_string("".join(parts)))


def sample_line(sample: Mapping[str, Any]) -> str:
    """Return what is kept of a sample, as a line of JSON."""
    kept = {
        name: sample[name]
        for name in ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "filtered_resps")
    }
    kept["choices"] = [arguments[1] for arguments in sample["arguments"]]
    kept["metrics"] = {name: sample[name] for name in sample["metrics"]}
    return json.dumps(kept, ensure_ascii=False, default=plain)


def plain(value: Any) -> Any:
    """Return a number of numpy, or anything else the harness may give, as JSON has it."""
    return value.item() if isinstance(value, np.generic) else str(value)


@cache  # it reads thousands of task files
def _task_manager(defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _load_data(manager: Any, task: str | Mapping[str, Any]) -> None:
    from datasets import config as datasets_config
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    unavailable = (DatasetsError, HfHubHTTPError, ConnectionError)
    try:
        manager.load([task if isinstance(task, str) else dict(task)])
    except (*unavailable, FileNotFoundError, ValueError) as error:
        if not isinstance(error, unavailable) and not _is_of_load_dataset(error):
            raise  # a task that is wrong, not its data
        name = task if isinstance(task, str) else task["task"]
        raise UserError(
            f"its data is not in the cache ({datasets_config.HF_DATASETS_CACHE}) and cannot be "
            f"fetched from the Hugging Face Hub: {first_line(error)}",
            field=_FIELD,
            value=name,
            hint="connect once to fill the cache (HF_HOME), and `hf auth login` if the dataset is "
            "gated; tasks that begin with local_ need no network",
        ) from error


def _is_of_load_dataset(error: BaseException) -> bool:
    """Return whether `datasets.load_dataset` raised an error.

    It raises ValueError and FileNotFoundError, too, such as for a copy without the subset.
    """
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == "datasets.load" for frame in frames)


def with_eos(tokenizer: Any) -> Any:
    """Return a tokenizer that has the end-of-text token which the harness needs.

    Its text begins with it where the context is empty, and generation may stop at it.
    """
    if tokenizer.eos_token_id is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own progress bars and log messages from the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_environment_report() -> Iterator[None]:
    """Keep `simple_evaluate` from calling `pip list` and others, two seconds for each task.

    The record has versions of its own.
    """
    from lm_eval import evaluator

    report = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = report
