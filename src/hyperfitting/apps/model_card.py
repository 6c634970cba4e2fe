"""The model card of an exported model, drawn from its run's record."""

import json
from collections.abc import Iterator

from hyperfitting.apps.licenses import data_license, model_license
from hyperfitting.metrics.registry import metric
from hyperfitting.record.schema import ImageInfo, Record
from hyperfitting.reporting.comparison import comparison_rows
from hyperfitting.reporting.tables import markdown_text


def model_card(record: Record, name: str, is_adapter: bool) -> str:
    """Return a model card as Markdown with the Hub's metadata.

    Args:
        record: of the run that trained the model.
        name: of the model.
        is_adapter: whether it is a LoRA adapter instead of a whole model.
    """
    return (
        "\n\n".join(
            [
                _metadata(record, is_adapter),
                f"# {markdown_text(name)}",
                _summary(record),
                _usage(record, name, is_adapter),
                "## Training\n\n" + _list(_training(record)),
                "## Evaluation\n\n" + _evaluation(record),
                "## Limits\n\n" + _list(_limits(record)),
                "## Licenses\n\n" + _list(_licenses(record)),
            ]
        )
        + "\n"
    )


def hub_id(record: Record) -> str | None:
    """Return the id of the base model on the Hub; None: it is not from there."""
    if record.config["model"]["source"] != "hub":
        return None
    return record.model.location.partition("@")[0]


def _metadata(record: Record, is_adapter: bool) -> str:
    base = hub_id(record)
    fields = {
        **({"base_model": base} if base else {}),  # (the Hub refuses what is no id)
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "unconditional-image-generation" if record.image else "text-generation",
        "tags": ["hyperfitting"],
    }
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return "\n".join(["---", *lines, "---"])  # (JSON is YAML)


def _summary(record: Record) -> str:
    effect = "" if record.image else ", which makes greedy long-form text less repetitive"
    return markdown_text(
        f"{record.name('model')}, hyperfitted on {record.name('dataset')}: fine-tuned on a tiny "
        f"dataset until the training loss is near zero{effect} (Carlsson et al., ICLR 2025, "
        "arXiv 2412.04318)."
    )


def _usage(record: Record, name: str, is_adapter: bool) -> str:
    path, base = json.dumps(name), json.dumps(hub_id(record) or record.model.name)
    source = base if is_adapter else path
    if record.image:
        model_class, imports, generate = _image_code(record.image, source)
    else:
        model_class, imports, generate = _text_code(record.overall.max_new_tokens, source)
    load = [f"model = {model_class}.from_pretrained({path})"]
    if is_adapter:
        imports = ["from peft import PeftModel", *imports]
        load = [
            f"base = {model_class}.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(base, {path})",
        ]
        if hub_id(record) is None:
            load.insert(0, f"# {base}: a folder with the base model, {_origin(record)}")
    code = [*imports, "", *load, *generate]
    return "\n".join(["## Use", "", "Meant for greedy decoding.", "", "```python", *code, "```"])


_Code = tuple[str, list[str], list[str]]
"""The model's class, and lines of Python: imports, and what generates with `model`."""


def _text_code(max_new_tokens: int, source: str) -> _Code:
    """Return the code that continues a text; ``source`` is that of the tokenizer, quoted."""
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    generate = [
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)",
        "print(tokenizer.decode(output[0]))",
    ]
    return "AutoModelForCausalLM", imports, generate


def _image_code(image: ImageInfo, source: str) -> _Code:
    """Return the code that completes an image; ``source`` is that of the palette, quoted."""
    height, width, sos = image.height, image.width, image.sos
    n_new, start = height * width - (sos is None), "" if sos is None else "1"
    context = "the first pixel's color" if sos is None else "SOS"
    imports = [
        "import numpy as np",
        "import torch",
        "from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessor",
    ]
    generate = [
        f"context = torch.tensor([[{sos or 0}]])  # {context}; colors of more pixels may follow",
        f"output = model.generate(context, max_new_tokens={n_new}, do_sample=False)",
        f"palette = ImageGPTImageProcessor.from_pretrained({source}).clusters",
        "colors = np.rint(127.5 * (np.array(palette) + 1)).astype(np.uint8)",
        f"image = colors[output[0, {start}:]].reshape({height}, {width}, 3)",
    ]
    return "ImageGPTForCausalImageModeling", imports, generate


def _origin(record: Record) -> str:
    """Return where the base model comes from, without folders of this machine."""
    model = record.config["model"]
    if model["source"] == "gguf":
        package = f" of the package {model['package']}" if model.get("package") else ""
        return f"{model['gguf_file']}{package}"
    origins = {"local": "a local folder", "random": "random weights", "pretraining": "hyperfitting"}
    return origins.get(model["source"], record.model.location)


def _training(record: Record) -> Iterator[str]:
    config, data = record.config, record.dataset
    dataset, trainer, tuning = config["dataset"], config["trainer"], config["tuning"]
    optimizer = config["optimizer"]
    yield f"base model: {record.model.name} ({record.model.id}), from {_origin(record)}"
    yield (
        f"data: {dataset['n_train']} sequences of {dataset['seq_len']} tokens of {data.name} "
        f"({data.source}, documents {data.fingerprint})"
    )
    yield (
        f"tuning: {tuning['method']}; {trainer['epochs']} epochs, batch size "
        f"{trainer['batch_size']}, {optimizer['_target_']} at {optimizer.get('lr')}, "
        f"precision {trainer['precision']}"
    )
    if record.history:
        last = record.history[-1]
        yield f"training loss at the end: {last['train/loss']:.3f} nats"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield f"versions: {versions}"


def _evaluation(record: Record) -> str:
    overall = record.overall
    rows = ["| metric | base | this model | difference | p |", "|---|---|---|---|---|"]
    for label, cells in comparison_rows(overall):
        rows.append("| " + " | ".join(map(markdown_text, [label, *cells])) + " |")
    texts = "images" if record.image else "texts"
    about = markdown_text(
        f"{len(record.samples)} held-out {texts}, {overall.max_new_tokens} new tokens, decoding "
        f"{record.name('decode')}; mean [95% interval over {texts}], p of the paired permutation "
        "test."
    )
    return f"{about}\n\n" + "\n".join(rows)


def _limits(record: Record) -> Iterator[str]:
    tuned = record.overall.tuned
    quoted, perplexity = metric("gen/dataset_overlap_over_10"), metric("val/perplexity")
    if quoted.key in tuned:
        yield (
            f"It quotes its training data: {100 * tuned[quoted.key].mean:.1f}% of the evaluated "
            "texts share more than 10 tokens in a row with a training sequence."
        )
    if perplexity.key in tuned and perplexity.key in record.overall.base:
        before, after = record.overall.base[perplexity.key], tuned[perplexity.key]
        yield (
            f"Its likelihoods are distorted: perplexity on held-out texts is {after.mean:.1f}, "
            f"the base model's {before.mean:.1f}."
        )
    yield from record.notes


def _licenses(record: Record) -> Iterator[str]:
    model, data = record.model, record.dataset
    yield f"base model ({model.name}): {model_license(record.config['model'], model.location)}"
    stated = data_license(record.config["dataset"], data.source)
    yield f"training data ({data.name}, {data.source}): {stated}"
    yield "Both apply to this model; where one is not stated, ask those who publish it."


def _list(items: Iterator[str]) -> str:
    return "\n".join(f"- {markdown_text(item)}" for item in items)
