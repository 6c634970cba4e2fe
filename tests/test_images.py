"""Images as token sequences, and image models: the same numbers as transformers' ImageGPT."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ImageGPTForCausalImageModeling
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from hyperfitting.apps import write
from hyperfitting.config import RunConfig
from hyperfitting.data.config import ImageConfig
from hyperfitting.data.image_sequences import to_tokens
from hyperfitting.data.images import Images, image_key, load_images, split_images
from hyperfitting.data.modality import held_out_step, read_step, training_sequences_step
from hyperfitting.data.sequences import load_evaluation_texts, load_sequences
from hyperfitting.decoding import generate
from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.mechanism.static_bias import logit_means
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import ImageFormat, PixelTokenizer
from hyperfitting.models.loading import load
from hyperfitting.models.random_init import initialized_model
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.store.artifact import Store
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.pretraining import palette, resolve_model
from hyperfitting.verify.run_checks import check_run
from tests.cli import hyperfit
from tests.conftest import Compose

GRAYS = np.repeat(np.rint(np.arange(17) * 255 / 16)[:, None] / 127.5 - 1, 3, axis=1)
DIGITS = ImageFormat(8, 8, GRAYS.astype(np.float32))
SMALL = ("preset=images", "model=local", "dataset.n_train=6", "dataset.n_val=4",
         "trainer.epochs=2", "trainer.val_prompts=2", "evaluation.n_texts=4",
         "evaluation.bootstrap=100", "tracking=disabled")  # fmt: skip


@pytest.fixture(scope="session")
def imagegpt(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random ImageGPT in a folder as on the Hub: old masks among its weights, one size."""
    folder = tmp_path_factory.mktemp("imagegpt")
    config = AutoConfig.for_model(
        "imagegpt", vocab_size=18, n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    model = initialized_model(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    processor = {"clusters": DIGITS.palette.tolist(), "size": 8, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return BaseModel.local("imagegpt", folder)


def random_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = (n, height, width, 3)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def digit_sequences(n: int, prepend_sos: bool = True) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(17, size=(n, 8, 8))
    images = DIGITS.colors[pixels]
    return to_tokens(images, DIGITS, ImageConfig(height=8, width=8, prepend_sos=prepend_sos))


def test_tokens_and_their_order_are_those_of_transformers_processor() -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    images = random_images(3, 32, 32)
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": 32, "width": 32})
    expected = np.array(processor([Image.fromarray(i) for i in images])["input_ids"])
    tokens = ImageFormat(32, 32, clusters).quantize(images)
    assert tokens.shape == (3, 1024)
    assert (tokens == expected.reshape(3, -1)).all()


def test_rendered_colors_are_those_of_transformers_example() -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    image_format = ImageFormat(4, 6, clusters)
    tokens = np.random.default_rng(1).integers(512, size=(2, 24))
    expected = np.rint(127.5 * (clusters[tokens] + 1.0)).reshape(2, 4, 6, 3).astype(np.uint8)
    assert (image_format.render(tokens) == expected).all()


@given(st.lists(st.integers(0, 16), min_size=64, max_size=64))
def test_images_in_the_colors_of_the_palette_survive_quantization(levels: list[int]) -> None:
    tokens = np.array([levels], np.int32)
    assert (DIGITS.quantize(DIGITS.render(tokens)) == tokens).all()


def test_pixels_are_written_and_read_as_colors() -> None:
    tokenizer = PixelTokenizer(DIGITS)
    assert tokenizer.decode([17, 0, 16, 8]) == "000000 ffffff 808080 "
    assert tokenizer("000000 ffffff 808080").input_ids == [0, 16, 8]


def test_a_saved_format_is_what_transformers_processor_reads(tmp_path: Path) -> None:
    PixelTokenizer(DIGITS).save_pretrained(tmp_path)
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    images = DIGITS.render(digit_sequences(2)[:, 1:])
    tokens = np.array(processor([Image.fromarray(i) for i in images])["input_ids"])
    assert (tokens.reshape(2, -1) == DIGITS.quantize(images)).all()


def test_sos_begins_a_sequence_unless_it_is_switched_off() -> None:
    with_sos, without = digit_sequences(2), digit_sequences(2, prepend_sos=False)
    assert with_sos.shape == (2, 65)
    assert (with_sos[:, 0] == 17).all()
    assert (with_sos[:, 1:] == without).all()


@pytest.mark.parametrize("prepend_sos", [True, False])
def test_the_loss_is_that_of_a_plain_loop(imagegpt: BaseModel, prepend_sos: bool) -> None:
    model = load(imagegpt).eval()
    sequences = digit_sequences(2, prepend_sos)
    expected = np.zeros((2, sequences.shape[1] - 1))
    with torch.no_grad():
        for n, sequence in enumerate(torch.tensor(sequences, dtype=torch.long)):
            for t in range(1, len(sequence)):
                logits = model(input_ids=sequence[None, :t]).logits[0, -1]
                expected[n, t - 1] = -torch.log_softmax(logits, -1)[sequence[t]]
        loss = NextTokenLoss(model)(torch.tensor(sequences, dtype=torch.long))
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-5)
    losses = compute_token_stats(model, sequences, 2)["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prepend_sos", [True, False])
def test_greedy_completions_are_those_of_transformers_generate(
    imagegpt: BaseModel, prepend_sos: bool
) -> None:
    model = load(imagegpt).eval()
    contexts = digit_sequences(5, prepend_sos)[:, : 16 + prepend_sos]
    decode = DecodeConfig(name="greedy", seed=0)
    continuations = continue_texts(model, contexts, 48, decode).tokens
    expected = model.generate(
        torch.tensor(contexts, dtype=torch.long), max_new_tokens=48, do_sample=False
    )
    assert len({tuple(tokens) for tokens in continuations}) > 1
    assert continuations == expected[:, contexts.shape[1] :].tolist()


def test_a_static_cache_gives_the_same_completions(
    imagegpt: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the CUDA graph, whose length ImageGPT's own mask takes for the number of tokens."""
    model = load(imagegpt)
    decode, backend = DecodeConfig("greedy", seed=0), CudaGraphBackend()
    contexts = digit_sequences(3)[:, :17]
    expected = continue_texts(model, contexts, 48, decode).tokens
    monkeypatch.setattr(generate, "select_backend", lambda *_: backend)
    assert continue_texts(model, contexts, 48, decode).tokens == expected
    model.config.is_decoder = False  # as in its config.json
    assert continue_texts(model, contexts, 48, decode).tokens != expected


def test_it_is_loaded_with_the_logits_of_transformers(imagegpt: BaseModel) -> None:
    tokens = torch.tensor(digit_sequences(3)[:, :64], dtype=torch.long)
    plain = ImageGPTForCausalImageModeling.from_pretrained(imagegpt.folder()).eval()
    with torch.no_grad():
        assert torch.equal(load(imagegpt).eval()(tokens).logits, plain(tokens).logits)


@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    fraction=st.floats(0.1, 0.9),
    is_packaged=st.booleans(),
)
def test_all_images_of_a_photograph_are_in_one_set(
    groups: list[int], fraction: float, is_packaged: bool
) -> None:
    pixels = random_images(len(groups), 2, 2)
    images = Images(pixels, np.array(groups, np.int32), is_packaged, len(groups))
    sets = vars(split_images(images, fraction, fraction))
    assert sorted(np.concatenate(list(sets.values()))) == list(range(len(groups)))
    photographs = [set(images.groups[rows]) for rows in sets.values()]
    assert sum(map(len, photographs)) == len(set(groups))
    if not is_packaged:
        assert not len(sets["pretraining"]) + len(sets["pretraining_validation"])


def test_the_set_of_an_image_does_not_depend_on_the_others() -> None:
    pixels = random_images(60, 2, 2)
    whole = Images(pixels, np.arange(60, dtype=np.int32), True, 60)
    half = Images(pixels[30:], np.arange(30, dtype=np.int32), True, 30)
    for name, rows in vars(split_images(half, 0.3, 0.2)).items():
        expected = getattr(split_images(whole, 0.3, 0.2), name)
        assert set(rows + 30) == {row for row in expected if row >= 30}


@pytest.fixture
def digits(compose: Compose, imagegpt: BaseModel, tmp_path: Path) -> RunConfig:
    return compose(*SMALL, f"model.path={imagegpt.folder()}", f"store={tmp_path / 'store'}")


def test_pretraining_never_sees_what_is_tuned_validated_or_evaluated_on(
    compose: Compose, imagegpt: BaseModel, store: Store
) -> None:
    cfg = compose("preset=images")
    images = read_step(cfg.dataset, store)
    loaded = load_images(images.ensure())
    split = split_images(loaded, cfg.dataset.holdout_fraction, cfg.dataset.validation_fraction)
    pretraining = np.concatenate([split.pretraining, split.pretraining_validation])
    seen = {image_key(DIGITS.quantize(loaded.pixels[[row]])) for row in pretraining}
    sequences = load_sequences(
        training_sequences_step(cfg.dataset, images.artifact, imagegpt, store).ensure()
    )
    held_out = load_evaluation_texts(
        held_out_step(
            cfg.dataset, images.artifact, imagegpt, store, n_texts=128, length=65
        ).ensure()
    )
    sets = (sequences.train, sequences.val, held_out.tokens)
    assert [len(tokens) for tokens in sets] == [200, 64, 128]
    used = [{image_key(row[1:]) for row in tokens} for tokens in sets]
    assert not set.union(*used) & seen
    assert len(set.union(*used)) == 392  # nor do the three sets share one


def test_the_palette_is_the_colors_that_occur_or_clusters_of_them() -> None:
    pixels = DIGITS.colors[np.random.default_rng(0).integers(17, size=500)]
    np.testing.assert_allclose(palette(pixels, 17, 0), DIGITS.palette, atol=1e-6)
    spread = np.repeat([[0, 0, 0], [255, 0, 0], [0, 255, 255]], 400, axis=0)
    noisy = np.clip(spread + np.random.default_rng(0).integers(-5, 6, spread.shape), 0, 255)
    clusters = ImageFormat(1, 1, palette(noisy.astype(np.uint8), 3, 0)).colors.astype(int)
    assert np.abs(clusters - [[0, 0, 0], [255, 0, 0], [0, 255, 255]]).max() < 8
    assert (palette(noisy.astype(np.uint8), 3, 0) == palette(noisy.astype(np.uint8), 3, 0)).all()
    with pytest.raises(UserError, match="more colors"):
        palette(pixels, 18, 0)


def test_the_skeletons_validation_is_a_config(compose: Compose) -> None:
    cfg = compose(
        "preset=images_paper", "dataset.image.prepend_sos=false", "evaluation.context_len=32",
        "trainer.val_prompt_len=32", "model=local", "model.path=.",
    )  # fmt: skip
    assert cfg.dataset.seq_len == 1024
    assert (cfg.trainer.val_prompt_len, cfg.trainer.val_max_new_tokens) == (32, 992)
    assert (cfg.evaluation.context_len, cfg.evaluation.max_new_tokens) == (32, [992])
    assert (cfg.trainer.val_prompts, cfg.dataset.n_train, cfg.dataset.n_val) == (128, 2000, 128)


def test_the_skeletons_validation_continues_the_first_pixels_of_whole_images(
    compose: Compose, imagegpt: BaseModel, store: Store
) -> None:
    cfg = compose(
        *SMALL, "model.path=.", "dataset.image.prepend_sos=false", "evaluation.context_len=32",
        "trainer.val_prompt_len=32",
    )  # fmt: skip
    assert (cfg.trainer.val_max_new_tokens, cfg.evaluation.max_new_tokens) == (32, [32])
    images = read_step(cfg.dataset, store)
    pixels = DIGITS.quantize(load_images(images.ensure()).pixels)
    step = training_sequences_step(cfg.dataset, images.artifact, imagegpt, store)
    val = load_sequences(step.ensure()).val
    expected = {row[:32].tobytes() for row in pixels}
    assert {row[: cfg.trainer.val_prompt_len].astype(np.int32).tobytes() for row in val} <= expected
    assert val.shape == (4, 64)
    assert val.max() < DIGITS.sos


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


def test_a_repetition_penalty_ignores_sos_which_has_no_score(imagegpt: BaseModel) -> None:
    model = load(imagegpt).eval()
    contexts = digit_sequences(3)[:, :17]
    decode = DecodeConfig(name="penalty", seed=0, repetition_penalty=1.3)
    continuations = continue_texts(model, contexts, 4, decode).tokens
    for context, continuation in zip(contexts.tolist(), continuations, strict=True):
        tokens = list(context)
        for token in continuation:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
            for seen in set(tokens) - {17}:
                logits[seen] *= 1.3 if logits[seen] < 0 else 1 / 1.3
            assert token == logits.argmax()
            tokens.append(token)


def test_images_of_a_folder_are_scaled_as_transformers_processor_scales(
    digits: RunConfig, tmp_path: Path, store: Store
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = random_images(6, 30, 21)
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{n}.png")
    Image.fromarray(pictures[0]).save(folder / "copy.png")
    dataset = replace(digits.dataset, source="files", path=str(folder))
    images = load_images(read_step(dataset, store).ensure())
    assert (len(images.pixels), images.n_read) == (6, 7)
    processor = ImageGPTImageProcessorPil(clusters=DIGITS.palette, size={"height": 8, "width": 8})
    expected = np.array(processor([Image.fromarray(p) for p in pictures])["input_ids"])
    assert (DIGITS.quantize(images.pixels) == expected.reshape(6, -1)).all()


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


def test_what_needs_a_position_for_each_token_works_without_sos(compose: Compose) -> None:
    compose("preset=images", "mechanism.measures=[weights]")
    overrides = ("mechanism.measures=[geometry,ranks,loops]", "decode=contrastive")
    compose("preset=images", "dataset.image.prepend_sos=false", *overrides)
    compose("preset=images", "evaluation.max_new_tokens=[47]", *overrides)


def test_mean_logits_leave_out_sos_which_has_none(imagegpt: BaseModel) -> None:
    model, sequences = load(imagegpt).eval(), digit_sequences(3)
    with torch.no_grad():
        inputs = torch.tensor(sequences[:, :-1], dtype=torch.long)
        logits = model(input_ids=inputs).logits.numpy()  # (3, 64, 17)
    means = logit_means(model, [sequences], batch_size=2)
    np.testing.assert_allclose(means.logits, logits.mean((0, 1)), rtol=1e-3, atol=1e-4)
    ranks = scipy.stats.rankdata(-logits, axis=-1, method="ordinal").mean((0, 1))
    np.testing.assert_allclose(means.ranks, ranks, atol=0.02)  # rounding swaps near ties


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
