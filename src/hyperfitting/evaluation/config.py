"""The config group `evaluation`: what the tuned and the base model are measured on."""

from dataclasses import dataclass

from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError
from hyperfitting.fields import RECORD, at_least, one_of, refuse_fields_of, setting


@dataclass
class EvaluationConfig:
    """Evaluation texts, lengths and metrics, the same for the tuned and the base model."""

    datasets: dict[str, TextsConfig] = setting(factory=dict, enters=RECORD)
    """Evaluation datasets by name (`dataset@evaluation.datasets.NAME=OPTION`); empty: the held-out
    documents of the dataset that is trained on. The same texts for every model and seed."""
    n_texts: int = setting(100, enters="evaluation_texts")
    """Texts of each dataset."""
    context_len: int = setting(32, enters="continuations")
    """Tokens at the start of each text that the model is given."""
    max_new_tokens: list[int] = setting(factory=lambda: [96, 224], enters=RECORD)
    """Lengths, in tokens, at which continuations are scored; each text is continued once, to the
    longest."""
    text_len: int | None = setting(None, enters="evaluation_texts")
    """Tokens of each reference text, context included, for perplexity and sharpness; none:
    `context_len` plus the longest of `max_new_tokens`."""
    checkpoint: str = setting("last", enters=RECORD)
    """Which weights of the tuned model: `last` (hyperfitted) or `best_val` (early-stopped: lowest
    validation loss)."""
    unit: str = setting("token", enters=RECORD)
    """Unit of Self-BLEU, Dataset BLEU and dataset overlap: `token` or `word`."""
    bleu_n: int = setting(4, enters=RECORD)
    """Longest n-grams of Self-BLEU and Dataset BLEU."""
    mauve: str | None = setting(None, enters=RECORD)
    """MAUVE (Pillutla et al., 2021) with features of this model: `base`, or a folder in Hugging
    Face format; null: not measured. Needs the extra `hyperfitting[mauve]`."""
    fid_weights: str | None = setting(None, enters=RECORD)
    """Of images: FID and KID with Inception's weights in this safetensors file; null: not measured.
    Needs the extra `hyperfitting[fid]`."""
    top_tokens: int = setting(0, enters="next_tokens")
    """Along the first text of each dataset, keep this many of the most likely next tokens with
    their probability (Figure 4 of Carlsson et al.); 0: none."""
    patch_block: int | None = setting(None, enters=RECORD)
    """Activation patching: where the base model's greedy continuation begins to repeat itself,
    replace the output of this block (the first is 1), once, by the tuned model's; does the loop
    break? Null: not measured."""
    downstream: list[str] = setting(factory=list, enters=RECORD)
    """Tasks or groups of lm-evaluation-harness, such as `gsm8k`, or of ours (`local_cloze_news`),
    that base and tuned model answer. Needs the extra `hyperfitting[downstream]`."""
    downstream_num_fewshot: int | None = setting(None, enters="downstream")
    """Solved examples in the prompt; null: each task's own number."""
    downstream_limit: int | None = setting(None, enters="downstream")
    """Questions of each task, the first ones; null: all."""
    downstream_chat_template: bool = setting(False, enters="downstream")
    """Ask in the chat template of the model's tokenizer."""
    chat: bool = setting(False, enters=RECORD)
    """Base and tuned model answer 40 open questions in the chat template of the model's tokenizer;
    the answers are scored as continuations are. For instruct models."""
    chat_max_new_tokens: int = setting(256, enters="chat_answers")
    """Longest answer, in tokens; it ends where the model ends it."""
    bootstrap: int = setting(10_000, enters=RECORD)
    """Bootstrap resamples of the texts per 95% interval, and permutations per p-value."""

    def __post_init__(self) -> None:
        for name, texts in self.datasets.items():
            texts.check(f"evaluation.datasets.{name}")
        at_least("evaluation.n_texts", self.n_texts, 1)
        at_least("evaluation.context_len", self.context_len, 1)
        if not self.max_new_tokens:
            raise UserError(
                "no length to measure at",
                field="evaluation.max_new_tokens",
                value="[]",
                valid="[96]",
            )
        for length in self.max_new_tokens:
            at_least("evaluation.max_new_tokens", length, 1)
        self.max_new_tokens = sorted(set(self.max_new_tokens))
        at_least("evaluation.text_len", self.text_len, self.context_len + 1)
        one_of("evaluation.checkpoint", self.checkpoint, ("last", "best_val"))
        one_of("evaluation.unit", self.unit, ("token", "word"))
        at_least("evaluation.bleu_n", self.bleu_n, 1)
        at_least("evaluation.top_tokens", self.top_tokens, 0)
        at_least("evaluation.patch_block", self.patch_block, 1)
        self._check_downstream()
        at_least("evaluation.chat_max_new_tokens", self.chat_max_new_tokens, 1)
        if not self.chat:
            refuse_fields_of(
                self, "evaluation", "chat_answers", "questions", "evaluation.chat=true"
            )
        at_least("evaluation.bootstrap", self.bootstrap, 100)

    def _check_downstream(self) -> None:
        self.downstream = list(dict.fromkeys(self.downstream))
        at_least("evaluation.downstream_num_fewshot", self.downstream_num_fewshot, 0)
        at_least("evaluation.downstream_limit", self.downstream_limit, 1)
        if not self.downstream:
            hint = "evaluation.downstream=[gsm8k]"
            refuse_fields_of(self, "evaluation", "downstream", "tasks", hint)

    @property
    def continuation_len(self) -> int:
        """New tokens that are generated for each text."""
        return self.max_new_tokens[-1]

    @property
    def total_len(self) -> int:
        """Tokens of a context with its continuation."""
        return self.context_len + self.continuation_len

    @property
    def reference_len(self) -> int:
        """Tokens of each reference text, context included."""
        return self.text_len or self.total_len
