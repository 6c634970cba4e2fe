"""`hyperfit-export`: a tuned model as a plain Hugging Face folder, or as a PEFT adapter.

The folder has safetensors, the tokenizer, a generation config for greedy decoding, and a model card
drawn from the record. transformers or PEFT load it without this package. With `--gguf` it also has
a file for llama.cpp, and `--push` commits it to a repository on the Hub. `--tasks` writes the run's
local downstream tasks into another folder, for lm-evaluation-harness.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
from hyperfitting.runtime.logs import log_warnings

if TYPE_CHECKING:
    from hyperfitting.apps.finished_run import FinishedRun
    from hyperfitting.models.loading import ModelState


def export(arguments: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        UserError: the run cannot be opened or trained nothing, a folder is not empty, there is no
            converter to GGUF, no local task, or the folder cannot be pushed (it is kept).
    """
    from hyperfitting.apps.finished_run import open_run
    from hyperfitting.apps.gguf_export import find_converter
    from hyperfitting.apps.harness_tasks import local_tasks_of, write_tasks
    from hyperfitting.apps.hub_push import check_push, push

    folder: Path = arguments.folder
    _check_free(folder, "DIR")
    if arguments.tasks is not None:
        _check_free(arguments.tasks, "--tasks")
    converter = find_converter(arguments.converter) if arguments.gguf else None
    if arguments.push is not None:
        check_push(arguments.push)
    run = open_run(arguments.run, arguments.store, "cpu")
    if run.tuned is None:
        raise UserError("this run trained nothing (tuning=none): there is no model to export")
    tasks = local_tasks_of(run.pipeline) if arguments.tasks is not None else []
    write_model(run, run.tuned, folder, as_adapter=arguments.adapter, converter=converter)
    print(f"model      {folder}")
    if tasks:
        with _new_folder(arguments.tasks) as partial:
            write_tasks(run.pipeline, tasks, partial, arguments.tasks)
        print(f"tasks      {arguments.tasks}")
    if arguments.push is not None:
        print(f"pushed     {push(folder, arguments.push)}")


def write_model(
    run: "FinishedRun",
    state: "ModelState",
    folder: Path,
    *,
    as_adapter: bool = False,
    converter: list[str] | None = None,
) -> None:
    """Write a tuned model and its card into a new folder, whole or not at all.

    Args:
        run: the run that it belongs to.
        state: the tuned model.
        folder: is created.
        as_adapter: write the LoRA adapter alone, instead of merging it into the base model.
        converter: command that writes a GGUF file into the folder, too; none: there is none.

    Raises:
        UserError: it has no adapter, or cannot be converted.
    """
    from hyperfitting.apps.gguf_export import convert
    from hyperfitting.apps.model_card import hub_id, model_card
    from hyperfitting.runtime.files import write_text

    with _new_folder(folder) as partial:
        if as_adapter:
            _write_adapter(state, partial, hub_id(run.record))
        else:
            _write_merged(run, state, partial)
        write_text(partial / "README.md", model_card(run.record, folder.name, as_adapter))
        if converter is not None:
            convert(converter, partial, folder.name, state.base.dtype)


def _write_merged(run: "FinishedRun", state: "ModelState", folder: Path) -> None:
    import torch
    from transformers import GenerationConfig

    if state.logit_transform is not None:
        raise UserError(
            "a control changes logits outside of the model: a folder cannot hold it",
            field="decode.control.method",
            value=run.record.config["decode"]["control"]["method"],
            valid="none",
        )
    model = state.load(torch.device("cpu"))
    config = GenerationConfig.from_model_config(model.config)
    config.do_sample = False
    config.max_new_tokens = run.record.overall.max_new_tokens
    model.generation_config = config
    model.save_pretrained(folder)
    run.pipeline.base.tokenizer().save_pretrained(folder)


def _write_adapter(state: "ModelState", folder: Path, base: str | None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as PEFT does.

    ``base`` is the base model's id on the Hub, if it is from there.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    from hyperfitting.models import loading, trainable

    if state.weights is None or state.tuning is None or not state.tuning.is_lora:
        raise UserError(
            "this run trained no LoRA adapter",
            field="tuning.method",
            value=state.tuning.method if state.tuning else "none",
            valid="lora or late_stage_lora, with --adapter",
        )
    model = loading.load(state.base)
    trainable.select_trainable(model, state.tuning)
    trainable.overlay(model, load_file(state.weights.file(state.file)))
    tensors = get_peft_model_state_dict(model)
    prefixed = {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.task_type = "CAUSAL_LM"
    config.save_pretrained(folder)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``folder`` on success; on an error nothing is left."""
    from hyperfitting.runtime.files import fsync_path

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
    )
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            # safetensors and mkdtemp write for the owner only
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            fsync_path(path)
        partial.replace(folder)  # an empty folder may be there
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_free(folder: Path, field: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "is not empty: nothing is overwritten",
            field=field,
            value=folder,
            valid="a folder that does not exist yet, or is empty",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperfit-export",
        description="Write the tuned model of a finished run as a Hugging Face folder.",
        epilog="Examples: hyperfit-export latest my-model; "
        "hyperfit-export latest my-model --gguf --push me/my-model",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or: latest")
    parser.add_argument("folder", metavar="DIR", type=Path, help="is created")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone, for PEFT (default: merged)"
    )
    parser.add_argument("--gguf", action="store_true", help="also write a GGUF file into it")
    parser.add_argument(
        "--converter",
        type=Path,
        metavar="PATH",
        help="llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)",
    )
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="commit it to this repository on the Hub, which is created private if it is new; "
        "needs a login (hf auth login, or HF_TOKEN)",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="DIR",
        help="also write the run's local downstream tasks, for lm_eval --include_path DIR",
    )
    parser.add_argument("--store", type=Path, help="the run's artifacts (default: as recorded)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.converter is not None and not parsed.gguf:
        parser.error("--converter changes nothing without --gguf")
    if parsed.gguf and parsed.adapter:
        parser.error("--gguf holds the merged model: leave out --adapter")
    log_warnings()
    sys.exit(exit_status(lambda: export(parsed)))


if __name__ == "__main__":
    main()
