"""Pictures of records: the grid of Figure 6, the pages, and W&B."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.reporting.figures import NoDataError, draw
from hyperfitting.reporting.images import data_uri, enlarged, picture
from hyperfitting.reporting.repetition_highlight import texts_page
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import ImageGridSpec
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.reporting.terminal import outcome
from hyperfitting.reporting.texts import texts_by_context
from hyperfitting.tracking.payload import media, report_media
from tests.records import image_record, make_record, make_samples, make_slice, write_sweep

GRID = ImageGridSpec.model_validate({"kind": "image_grid", "count": 2})
HALF = Estimate(0.5, (0.4, 0.6), 2)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    records = {
        "base_0": image_record(3, tuning="none"),
        "tuned_0": image_record(1),
        "tuned_1": image_record(2),
    }
    return write_sweep(tmp_path / "sweeps" / "figure6", {}, records)


def decoded(address: str) -> np.ndarray:
    head, _, content = address.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))


def test_a_picture_is_context_and_completion_in_the_palette() -> None:
    pixels = picture(image_record(), 1, "tuned")
    assert pixels.shape == (4, 4, 4)
    assert pixels[0].tolist() == [[255, 0, 0, 255], *[[0, 0, 0, 255]] * 3]
    assert (pixels[1:] == [255, 0, 0, 255]).all()


def test_the_context_alone_is_transparent_below() -> None:
    pixels = picture(image_record(), 0, None)
    assert (pixels[0, :, 3] == 255).all()
    assert (pixels[1:] == 0).all()


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    pixels = picture(image_record(), 0, "reference")
    large = decoded(data_uri(pixels))
    assert large.shape == (128, 128, 4)
    assert np.array_equal(large[::32, ::32], pixels)
    assert np.array_equal(large, np.kron(pixels, np.ones((32, 32, 1), np.uint8)))
    assert enlarged(np.zeros((200, 200, 4), np.uint8)).shape == (200, 200, 4)


def test_the_grid_has_a_column_for_each_model_and_the_real_images(sweep: Path) -> None:
    figure = draw(load_sweep(sweep), GRID)
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert titles == ["context", "base, greedy", "tuned_0", "tuned_1", "real image"]
    assert len(figure.axes) == 2 * len(titles)
    second_row = [np.asarray(panel.images[0].get_array())[-1, -1, :3] for panel in figure.axes[5:]]
    assert np.array(second_row).tolist() == [
        [0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [255, 255, 255]
    ]  # fmt: skip


def test_the_columns_of_the_grid_are_the_labels_of_an_axis(sweep: Path) -> None:
    spec = ImageGridSpec.model_validate({"kind": "image_grid", "columns": "system", "first": 1})
    figure = draw(load_sweep(sweep), spec)
    assert [panel.get_title() for panel in figure.axes] == [
        "context",
        "base",
        "tuned",
        "real image",
    ]
    with pytest.raises(NoDataError, match="2 images in common"):
        draw(load_sweep(sweep), spec.model_copy(update={"first": 2}))


def test_runs_of_texts_have_no_grid(tmp_path: Path) -> None:
    texts = make_record([make_slice({"gen/ttr": HALF})], make_samples(2))
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": texts})
    with pytest.raises(NoDataError, match="no run is of images"):
        draw(load_sweep(folder), GRID)


def test_a_report_without_a_description_shows_the_grid_and_every_image(sweep: Path) -> None:
    out = write_report(sweep)
    first = {path.name: path.read_bytes() for path in out.glob("images.*")}
    assert first.keys() == {"images.pdf", "images.png", "images.svg"}
    write_report(sweep)
    assert first == {path.name: path.read_bytes() for path in out.glob("images.*")}
    page = (out / "index.html").read_text()
    data = re.findall(r'<script type="application/json" id="text-\d+">(.*?)</script>', page)
    shown = [json.loads(content) for content in data]
    assert len(shown) == 2
    assert np.array_equal(
        decoded(shown[1]["continuations"][1]["image"])[::32, ::32],
        picture(image_record(1), 1, "tuned"),
    )
    assert decoded(shown[0]["reference_image"]).shape == (128, 128, 4)
    assert ">Images</h2>" in page
    assert "digits <b>" not in page
    assert "repeated rows" in (out / "runs.md").read_text()


def test_the_metrics_of_an_image_stand_under_it(sweep: Path) -> None:
    base, *_ = texts_by_context(load_sweep(sweep))
    tuned = next(c for c in base.continuations if c.run is not None)
    assert tuned.spans == []
    assert ("repeated rows", "1.000") in tuned.metrics
    assert ("class", "7 (true: 7)") in tuned.metrics


def test_the_page_of_a_run_shows_images_with_descriptions_and_without_scripts() -> None:
    page = texts_page(image_record())
    assert page.count("<img ") == 2 * 4
    alts = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)">', page)
    assert alts[:4] == [
        "context", "completed by the base model", "completed by the tuned model", "real image"
    ]  # fmt: skip
    assert "default-src 'none'" in page
    assert "img-src data:" in page
    assert "digits <b>" not in page


def test_the_terminal_prints_no_colors_as_text() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(outcome(image_record(), color=False))
    text = console.file.getvalue()
    assert "repeated rows" in text
    assert "ff0000" not in text


def test_wandb_receives_images_as_images(sweep: Path) -> None:
    import wandb

    table = media(image_record())["texts"]()
    row = dict(zip(table.columns, table.data[1], strict=True))
    assert isinstance(row["tuned"], wandb.Image)
    pixels = np.asarray(row["tuned"].image.convert("RGBA"))
    assert np.array_equal(pixels[::32, ::32], picture(image_record(), 1, "tuned"))
    assert row["gen/row_repeat"] == 0.25
    contexts = report_media(load_sweep(sweep), sweep)["contexts"]()
    assert all(isinstance(value, wandb.Image) for value in contexts.data[0])
