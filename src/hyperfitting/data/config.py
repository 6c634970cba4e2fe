"""The config group `dataset`: which documents, and how they become token sequences."""

from dataclasses import dataclass

from omegaconf import MISSING, DictConfig, OmegaConf

from hyperfitting.errors import UserError
from hyperfitting.fields import (
    RECORD,
    at_least,
    fraction,
    one_of,
    refuse_unused,
    required,
    setting,
)

_ROWS = ("hub", "files")
"""Sources whose documents are rows."""


@dataclass
class ImageConfig:
    """How images become token sequences: a token for each pixel, in raster order."""

    height: int = setting(32, enters="images")
    """Rows; images of another size are scaled to it. As the model's."""
    width: int = setting(32, enters="images")
    """Pixels of a row."""
    column: str = setting("image", enters="images")
    """Hub: column that holds the image."""
    prepend_sos: bool = setting(True, enters="sequences")
    """Begin each image with SOS, as in ImageGPT's pre-training. Without it, as in the authors'
    published code, each pixel stands one position earlier than in pre-training."""

    @property
    def n_pixels(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def n_tokens(self) -> int:
        """Tokens of an image, SOS included."""
        return self.n_pixels + self.prepend_sos

    def check(self, at: str) -> None:
        """Refuse invalid values; ``at`` is the position of this config in the whole."""
        at_least(f"{at}.height", self.height, 1)
        at_least(f"{at}.width", self.width, 1)


@dataclass
class TextsConfig:
    """Which documents, and what counts as one."""

    name: str = setting(MISSING, enters=RECORD)
    """Short name for tables and W&B."""
    source: str = setting("hub", enters="documents")
    """`hub` (Hugging Face Hub), `files` (your own), `package` (texts that a package ships)."""
    path: str | None = setting(None, enters="documents")
    """Hub id; file or folder for `files`; name of the sample for `package`."""
    subset: str | None = setting(None, enters="documents", read_by=("hub",))
    """The dataset's configuration, such as `wikitext-103-raw-v1`."""
    split: str = setting("train", enters="documents", read_by=_ROWS)
    """Of the Hub and `datasets` folders: the split to read, or a slice such as `train[:1000]`."""
    revision: str | None = setting(None, enters="documents", read_by=("hub",))
    """Branch, tag or commit."""
    text_field: str = setting("text", enters="documents", read_by=_ROWS)
    """Column or key that holds the text (.jsonl, .csv, .parquet, `datasets`)."""
    document_start: str | None = setting(None, enters="documents", read_by=_ROWS)
    """Regular expression; a row (or line of a .txt) that matches at its start begins a new
    document. Null: each row and each .txt file is one document."""
    chat: bool = setting(False, enters="chat")
    """Rows are conversations, and become tokens in the chat template of the model's tokenizer.
    `text_field` holds a list of messages, `{"role": …, "content": …}`; in .jsonl and .json a row
    may have a `prompt` and a `response` instead."""
    sequences: str = setting("prefix", enters="sequences")
    """`prefix`: the first tokens of each document (the paper's protocol); `packed`, for few and
    long documents: training sequences are cut from concatenated documents, evaluation texts are
    passages that begin at a paragraph."""
    holdout_fraction: float = setting(0.2, enters="sequences")
    """Fraction of the documents held out for evaluation, by a hash of their text: whatever the
    seed, model or number of sequences, they are never trained or validated on. Near-duplicates
    are held out together."""
    image: ImageConfig | None = setting(None, enters=RECORD)
    """For images, of which each is a document; null: texts."""

    def check(self, at: str) -> None:
        """Refuse invalid values; ``at`` is the position of this config in the whole."""
        one_of(f"{at}.source", self.source, ("hub", "files", "package"))
        one_of(f"{at}.sequences", self.sequences, ("prefix", "packed"))
        if self.chat and (self.source == "package" or self.document_start is not None):
            raise UserError(
                "packaged samples, and rows that are joined into documents, are no conversations",
                field=f"{at}.chat",
                value=self.chat,
                valid="with source=files or hub, and document_start=null",
            )
        fraction(f"{at}.holdout_fraction", self.holdout_fraction)
        refuse_unused(self, at, "source")
        if self.image is not None:
            self.image.check(f"{at}.image")
        required(
            f"{at}.path",
            self.path,
            {
                "hub": "the dataset's id on the Hub",
                "files": "your file or folder",
                "package": "the name of a packaged sample",
            }[self.source],
            f"{at}.path=…",
        )


@dataclass
class DatasetConfig(TextsConfig):
    """Which documents are trained on, and how they become token sequences."""

    seq_len: int = setting(256, enters="sequences")
    """Tokens of a training or validation sequence; of images derived: the whole image."""
    n_train: int = setting(2000, enters="sequences")
    """Training sequences."""
    n_val: int = setting(128, enters="sequences")
    """Validation sequences (see `trainer.eval_every_epochs`)."""
    validation_fraction: float = setting(0.2, enters="sequences")
    """Fraction of the other documents from which validation sequences are taken, by a hash of
    their text; training sequences are taken from the rest."""
    seed: int = setting(MISSING, enters="sequences")
    """Selects the training and validation sequences, independent of the model."""
    assistant_only_loss: bool = setting(True, enters="chat")
    """With `chat`: only the assistant's messages count in the loss. Off: all tokens do."""

    def __post_init__(self) -> None:
        self.check("dataset")
        at_least("dataset.seq_len", self.seq_len, 2)
        if self.image is not None:
            self._derive_seq_len(self.image)
        at_least("dataset.n_train", self.n_train, 1)
        at_least("dataset.n_val", self.n_val, 1)
        fraction("dataset.validation_fraction", self.validation_fraction)
        at_least("dataset.seed", self.seed, 0)
        if not self.assistant_only_loss and not self.chat:
            raise UserError(
                "changes nothing where rows are no conversations",
                field="dataset.assistant_only_loss",
                value=self.assistant_only_loss,
                valid="only with dataset.chat=true",
            )

    def _derive_seq_len(self, image: ImageConfig) -> None:
        """Set the length of a sequence to that of an image; refuse another one."""
        if self.seq_len not in (DatasetConfig.seq_len, image.n_tokens):
            raise UserError(
                "changes nothing: a sequence is a whole image",
                field="dataset.seq_len",
                value=self.seq_len,
                valid=f"{image.n_tokens}, by dataset.image",
                hint="preset=images or images_paper, if a preset for texts sets it",
            )
        self.seq_len = image.n_tokens


def register_resolvers() -> None:
    """Register the resolvers of lengths that follow from the size of `dataset.image`."""
    OmegaConf.register_new_resolver("image_tokens", _image_tokens, replace=True)
    OmegaConf.register_new_resolver("rest_of_image", _rest_of_image, replace=True)


def _image_tokens(fraction: float, *, _root_: DictConfig) -> int:
    """Return the tokens of the first pixels of an image, SOS included: `${image_tokens:0.25}`.

    Of a text, those of the first part of `dataset.seq_len`.
    """
    dataset = _root_.dataset
    if dataset.image is None:
        return round(fraction * int(dataset.seq_len))
    n_pixels = int(dataset.image.height) * int(dataset.image.width)
    return round(fraction * n_pixels) + int(dataset.image.prepend_sos)


def _rest_of_image(context_len: int, *, _root_: DictConfig) -> int:
    """Return the tokens of an image after its context: `${rest_of_image:${…context_len}}`."""
    return _image_tokens(1.0, _root_=_root_) - context_len
