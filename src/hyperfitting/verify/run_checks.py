"""All checks of one finished run, from what lies in its folder to its artifacts."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyperfitting.config import RunConfig, from_plain, register
from hyperfitting.errors import UserError
from hyperfitting.fields import differing_fields, result_settings
from hyperfitting.formatting import first_line, listed
from hyperfitting.pipeline.build import recorded_pipeline
from hyperfitting.record.files import (
    CHECKSUMS_FILE,
    PREDICTIONS_FILE,
    RECORD_FILE,
    TEXTS_PAGE,
    Predictions,
    read_checksums,
    read_predictions,
    read_record,
)
from hyperfitting.record.schema import Record
from hyperfitting.record.texts import SampleText
from hyperfitting.reporting.repetition_highlight import texts_page
from hyperfitting.runtime.code_version import DIFF_FILE, code_version
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.files import OtherVersionError
from hyperfitting.store.hashing import digest, file_sha256
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify.check import Check
from hyperfitting.verify.recorded import check_consistency
from hyperfitting.verify.scores import check_scores
from hyperfitting.verify.store import (
    check_artifacts,
    check_ids,
    check_rebuilt,
    recorded_store,
)

_HYDRA_CONFIG = Path(".hydra") / "config.yaml"


def check_run(folder: Path, store: Path | None = None) -> Iterator[Check]:
    """Yield the checks of a run, the cheap ones first; nothing is written.

    Args:
        folder: of the run, with its results.json.
        store: holds its artifacts; none: the store that the record names.
    """
    try:
        record = read_record(folder / RECORD_FILE)
        if "${" in str(record.config):  # composing resolves them, so no run records one
            raise UserError("config holds an interpolation")
        config = from_plain(record.config)
    except OtherVersionError as error:
        yield Check("record", "not checked", error.problem)
        return
    except (UserError, OmegaConfBaseException) as error:
        yield Check("record", "failed", first_line(error))
        return
    yield Check("record", "passed", f"schema {record.schema_version}, {len(record.samples)} texts")
    yield _check_files(folder)
    yield _check_code(folder, record)
    yield from _check_commands(folder, config)
    yield _check_texts(folder, record)
    yield check_consistency(record, config)
    recorded = None
    try:
        recorded = read_predictions(folder)
        yield _check_scores(record, recorded)
    except (UserError, ValueError) as error:
        yield Check("scores", "failed", first_line(error))
    yield from _check_store(record, config, recorded, store or recorded_store(record))


def _check_files(folder: Path) -> Check:
    name = "files"
    try:
        checksums = read_checksums(folder)
    except UserError as error:
        return Check(name, "failed", f"{CHECKSUMS_FILE} {error.problem}")
    if checksums is None:
        return Check(name, "not checked", f"there is no {CHECKSUMS_FILE}")
    paths = {file: folder / file for file in checksums}
    missing = [file for file, path in paths.items() if not path.is_file()]
    present = (PREDICTIONS_FILE, RECORD_FILE, TEXTS_PAGE, DIFF_FILE)
    unlisted = [file for file in present if (folder / file).is_file() and file not in checksums]
    changed = [f for f, p in paths.items() if p.is_file() and file_sha256(p) != checksums[f]]
    problems = {"changed": changed, "missing": missing, "without a checksum": unlisted}
    if any(problems.values()):
        texts = (f"{what}: {listed(files)}" for what, files in problems.items() if files)
        return Check(name, "failed", "; ".join(texts))
    return Check(name, "passed", f"{len(checksums)} match {CHECKSUMS_FILE}")


def _check_code(folder: Path, record: Record) -> Check:
    name, code = "code", record.code
    path = folder / DIFF_FILE
    kept = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    expected = code.git.diff_sha256 if code.git is not None else None
    if kept is not None and kept != expected:
        return Check(name, "failed", f"{DIFF_FILE} is not the one that the record was made with")
    if expected is not None and kept is None:
        return Check(name, "not checked", f"{code}: there is no {DIFF_FILE}")
    if code.digest != code_version().digest:
        return Check(name, "not checked", f"made by {code}; this is {code_version()}")
    return Check(name, "passed", f"made by this code: {code}")


def _check_commands(folder: Path, config: RunConfig) -> Iterator[Check]:
    """Compare the config with what Hydra composed, and with the run's entry in its sweep."""
    path = folder / _HYDRA_CONFIG
    if path.is_file():
        register()  # the resolvers
        try:
            values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
            changed = sorted(differing_fields(asdict(from_plain(values)), config))
        except (UserError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
            yield Check("config", "not checked", f"{_HYDRA_CONFIG}: {first_line(error)}")
        else:
            detail = f"not as composed in {_HYDRA_CONFIG}: {listed(changed)}"
            yield _failed_if("config", bool(changed), detail, f"as composed in {_HYDRA_CONFIG}")
    if not (folder.parent / SPEC_FILE).is_file():
        if not path.is_file():
            yield Check("config", "not checked", f"there is no {_HYDRA_CONFIG}")
        return
    try:
        runs = {run.name: run for run in read_sweep_spec(folder.parent).runs}
    except UserError as error:
        yield Check("place in the sweep", "not checked", error.problem)
        return
    run = runs.get(folder.name)
    if run is None or run.settings is None:
        yield Check("place in the sweep", "not checked", f"{SPEC_FILE} does not describe this run")
        return
    yield _failed_if(
        "place in the sweep",
        run.settings != digest(result_settings(config)),
        f"the record of another run than {folder.name} of this sweep",
        f"the settings of {folder.name} in {SPEC_FILE}",
    )


def _check_texts(folder: Path, record: Record) -> Check:
    texts: dict[str, SampleText] = {
        f"samples[{i}].{side}": getattr(sample, side)
        for i, sample in enumerate(record.samples)
        for side in ("context", "tuned", "base", "reference")
    }
    texts |= {
        f"chat.answers[{i}].{side}": getattr(answer, side)
        for i, answer in enumerate(record.chat.answers if record.chat else ())
        for side in ("tuned", "base")
    }
    edited = [name for name, text in texts.items() if "".join(text.token_texts) != text.text]
    page = folder / TEXTS_PAGE
    if page.is_file() and page.read_bytes() != texts_page(record).encode(
        "utf-8", "backslashreplace"
    ):
        edited.append(TEXTS_PAGE)
    detail = f"not the text of the tokens: {listed(edited)}"
    return _failed_if(
        "texts", bool(edited), detail, f"{len(texts)} texts are those of their tokens"
    )


def _check_scores(record: Record, recorded: Predictions | None) -> Check:
    name = "scores"
    if recorded is None:
        return Check(name, "not checked", f"there is no {PREDICTIONS_FILE}")
    result = check_scores(record, recorded)
    detail = str(result.differences)
    if result.not_computed:
        detail += f"; text values as recorded: {', '.join(result.not_computed)}"
    return _failed_if(name, result.differences.kind == "different", detail, detail)


def _check_store(
    record: Record, config: RunConfig, recorded: Predictions | None, store: Path | None
) -> Iterator[Check]:
    try:
        pipeline = recorded_pipeline(
            config,
            store or Path("outputs/store"),
            HardwareConfig(device="cpu"),
            torch.device("cpu"),
        )
        ids = check_ids(record, pipeline)
    except UserError as error:
        pipeline, ids = None, Check("artifact ids", "not checked", first_line(error))
    yield ids
    if store is None or not store.is_dir():
        yield Check("artifacts", "not checked", f"there is no store {store}")
        return
    artifacts = check_artifacts(record, store)
    yield artifacts
    # damaged or missing artifacts would be built again, and those of other ids are not the record's
    if pipeline is None or {ids.outcome, artifacts.outcome} != {"passed"}:
        yield Check("record from artifacts", "not checked", "needs every artifact, with its id")
        return
    yield check_rebuilt(record, recorded, pipeline)


def _failed_if(name: str, failed: bool, problem: str, detail: str) -> Check:
    return Check(name, "failed", problem) if failed else Check(name, "passed", detail)
