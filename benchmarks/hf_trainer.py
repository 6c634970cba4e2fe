"""HF Trainer as a peer, well configured: fused Adam, no clipping, no extras."""

from collections.abc import Callable
from typing import Any


def build_trainer(
    model: Any,
    sequences: list[list[int]],
    batch_size: int,
    steps: int,
    on_step_begin: Callable[[int], object],
    on_step_end: Callable[[int], object],
    **arguments: Any,
) -> Any:
    """Return a Trainer whose callback calls two functions with the number of finished steps.

    Args:
        arguments: further ones of `TrainingArguments`.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class StepCallback(TrainerCallback):  # type: ignore[misc] # mypy skips transformers
        def on_step_begin(self, _: object, state: Any, *__: object, **___: object) -> None:
            on_step_begin(state.global_step)

        def on_step_end(self, _: object, state: Any, *__: object, **___: object) -> None:
            on_step_end(state.global_step)

    training_arguments = TrainingArguments(
        per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=1e-6,
        weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        optim="adamw_torch_fused", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, seed=0, **arguments,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in sequences]
    return Trainer(model, training_arguments, train_dataset=data, callbacks=[StepCallback()])
