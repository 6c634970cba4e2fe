"""Runs on images: their configs, what is refused, and models pre-trained here."""

from dataclasses import replace
from pathlib import Path

import pytest

from hyperfitting.apps import write
from hyperfitting.config import RunConfig
from hyperfitting.data.modality import read_step, training_sequences_step
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.store.artifact import Store
from hyperfitting.training.pretraining import resolve_model
from hyperfitting.verify.run_checks import check_run
from tests.cli import hyperfit
from tests.conftest import Compose
from tests.images import DIGITS, SMALL, digits, imagegpt

__all__ = ["digits", "imagegpt"]


def test_the_authors_published_validation_is_a_config(compose: Compose) -> None:
    cfg = compose(
        "preset=images_paper", "dataset.image.prepend_sos=false", "evaluation.context_len=32",
        "trainer.val_prompt_len=32", "model=local", "model.path=.",
    )  # fmt: skip
    assert cfg.dataset.seq_len == 1024
    assert (cfg.trainer.val_prompt_len, cfg.trainer.val_max_new_tokens) == (32, 992)
    assert (cfg.evaluation.context_len, cfg.evaluation.max_new_tokens) == (32, [992])
    assert (cfg.trainer.val_prompts, cfg.dataset.n_train, cfg.dataset.n_val) == (128, 2000, 128)


def test_a_quarter_of_the_pixels_is_the_context(compose: Compose) -> None:
    cfg = compose("preset=images")
    assert (cfg.dataset.seq_len, cfg.evaluation.context_len) == (65, 17)
    cfg = compose("preset=images_paper", "model=local", "model.path=.")
    assert (cfg.dataset.seq_len, cfg.evaluation.context_len) == (1025, 257)
    assert cfg.evaluation.max_new_tokens == [768]


def test_a_sequence_is_a_whole_image(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"dataset\.seq_len=32: changes nothing"):
        compose("preset=images", "dataset.seq_len=32")
    assert compose("preset=images", "dataset.seq_len=65").dataset.seq_len == 65


def test_models_and_datasets_of_other_modalities_are_refused(
    digits: RunConfig, base: BaseModel, imagegpt: BaseModel, compose: Compose, store: Store
) -> None:
    images = read_step(digits.dataset, store)
    images.ensure()
    with pytest.raises(UserError, match="no image model"):
        training_sequences_step(digits.dataset, images.artifact, base, store).ensure()
    texts = compose("preset=debug").dataset
    documents = read_step(texts, store)
    documents.ensure()
    with pytest.raises(UserError, match="a model of images"):
        training_sequences_step(texts, documents.artifact, imagegpt, store).ensure()
    larger = replace(digits.dataset.image, height=16)
    dataset = replace(digits.dataset, image=larger, seq_len=129)
    images = read_step(dataset, store)
    images.ensure()
    with pytest.raises(UserError, match="another size"):
        training_sequences_step(dataset, images.artifact, imagegpt, store).ensure()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluation.downstream=[local_agreement]", "for models of text"),
        ("evaluation.mauve=base", "for models of text"),
        ("mechanism.measures=[weights,lens]", "for models of text"),
        ("mechanism.measures=[weights,geometry]", "one more than the model has positions"),
        ("decode=contrastive", "one more than the model has positions"),
    ],
)
def test_what_does_not_work_on_image_models_is_refused(
    compose: Compose, override: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as error:
        compose("preset=images", override)
    assert override.startswith(error.value.field.rpartition(".")[0])


def test_images_are_no_conversations(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"dataset\.chat=True: is for models of text"):
        compose("preset=images", "dataset=image_files", "dataset.path=x", "dataset.chat=true")


def test_what_needs_a_position_for_each_token_works_without_sos(compose: Compose) -> None:
    compose("preset=images", "mechanism.measures=[weights]")
    overrides = ("mechanism.measures=[geometry,ranks,loops]", "decode=contrastive")
    compose("preset=images", "dataset.image.prepend_sos=false", *overrides)
    compose("preset=images", "evaluation.max_new_tokens=[47]", *overrides)


def test_a_pretrained_model_has_an_id_and_a_config_before_it_is_built(
    compose: Compose, store: Store
) -> None:
    cfg = compose("preset=images", "tuning=none").model
    model = resolve_model(cfg, store)
    assert model.transformers_config().vocab_size == 18
    assert not store.folder.exists()
    other = replace(cfg, pretraining=replace(cfg.pretraining, lr=0.1))
    assert resolve_model(other, store).id != model.id


def test_an_unknown_architecture_is_a_users_error(compose: Compose, store: Store) -> None:
    cfg = compose("preset=images", "model.architecture.model_type=imagegtp").model
    with pytest.raises(UserError, match="transformers cannot build it"):
        resolve_model(cfg, store).transformers_config()


def test_a_run_pretrains_tunes_and_completes_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = hyperfit(
        tmp_path, *SMALL, "model=imagegpt_digits", "model.architecture.n_embd=32",
        "model.architecture.n_layer=2", "model.pretraining.n_train=32", "model.pretraining.n_val=8",
        "model.pretraining.epochs=1", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = read_record(tmp_path / "run" / RECORD_FILE)
    assert record.image is not None
    assert (record.image.height, record.image.width, record.image.sos) == (8, 8, 17)
    assert [list(color) for color in record.image.palette] == DIGITS.colors.tolist()
    (dataset,) = {sample.dataset for sample in record.samples}
    assert dataset == "digits"
    for sample in record.samples:
        assert sample.context.tokens[0] == 17
        assert len(sample.context.tokens + sample.tuned.tokens) == 65
        assert max(sample.tuned.tokens + sample.base.tokens) < 17
    checks = check_run(tmp_path / "run", tmp_path / "outputs/store")
    outcomes = {check.name: check.outcome for check in checks}
    assert "failed" not in outcomes.values()
    assert {outcomes[name] for name in ("config", "scores", "artifact ids")} == {"passed"}
    with pytest.raises(SystemExit):
        write.main([str(tmp_path / "run"), "ffffff", "--store", str(tmp_path / "outputs/store")])
    assert "is a run of images" in capsys.readouterr().err
