"""The config groups `hardware` and `tracking`: where and how fast. Neither enters any id."""

from dataclasses import dataclass

from hyperfitting.fields import RUNTIME, above_zero, at_least, one_of, required, setting


@dataclass
class HardwareConfig:
    """Devices, processes and batch sizes."""

    device: str = setting("auto", enters=RUNTIME)
    """`auto` (CUDA, else MPS, else CPU), or a torch device such as `cpu`, `cuda:1`."""
    threads: int | None = setting(None, enters=RUNTIME)
    """CPU threads; null: torch's default."""
    num_processes: int | None = setting(1, enters=RUNTIME)
    """Processes that train one model with FSDP2: parameters, gradients, optimizer state and batch
    are sharded over one GPU each, or over CPU processes. Null: one per GPU of this machine. Under
    torchrun, its world size."""
    deterministic: bool = setting(True, enters=RUNTIME)
    """Train on a GPU with kernels that give the same result every time, so that a repeated or
    resumed training on the same machine ends with the same weights (if no micro-batch was halved
    for lack of memory); a model that needs a kernel without such a variant is refused. False:
    torch's defaults. Always so on a CPU."""
    activation_checkpointing: bool = setting(False, enters=RUNTIME)
    """Store only the input of each block and recompute the block in the backward pass: a third more
    work for a fraction of the activation memory."""
    compile: bool | None = setting(None, enters=RUNTIME)
    """torch.compile the trained blocks (half a minute, needs a C++ compiler). Null: where training
    is long enough to gain."""
    micro_batch_size: int | None = setting(None, enters=RUNTIME)
    """Sequences per forward and backward pass (gradients are accumulated over the batch); none:
    about 512 tokens on a CPU, and as much of the batch as fits on a GPU."""
    generation_batch_size: int | None = setting(None, enters=RUNTIME)
    """Texts continued together, in equal batches; more than fit is an error. Null: as many as fit
    into half of the free memory, at most 64 on a CPU and 512 on a GPU, halved when GPU memory runs
    out. On a CPU it changes no text; on a GPU kernels differ by shape, and a token can where two
    are about as likely, so fix it to repeat a record's texts (`generation_batches`)."""
    evaluation_batch_size: int = setting(8, enters=RUNTIME)
    """Sequences per forward pass without gradients."""
    device_map: str | None = setting(None, enters=RUNTIME)
    """`auto`: evaluate with the model's blocks placed on all GPUs of this machine (accelerate), for
    models that fit on no single one; slower, since one GPU works at a time."""
    plan_gpu_memory_gb: float | None = setting(None, enters=RUNTIME)
    """With `plan=true`, for GPUs other than this machine's: memory of one, in units of 1e9
    bytes."""
    plan_gpu_tflops: float | None = setting(None, enters=RUNTIME)
    """With `plan=true`, for GPUs other than this machine's: throughput of large matrix products in
    the training precision, in 1e12 operations per second."""

    def __post_init__(self) -> None:
        above_zero("hardware.plan_gpu_memory_gb", self.plan_gpu_memory_gb)
        above_zero("hardware.plan_gpu_tflops", self.plan_gpu_tflops)
        if (self.plan_gpu_memory_gb is None) != (self.plan_gpu_tflops is None):
            missing, given = "plan_gpu_tflops", "plan_gpu_memory_gb"
            if self.plan_gpu_memory_gb is None:
                missing, given = given, missing
            required(
                f"hardware.{missing}",
                None,
                f"hardware.{given} alone does not describe another GPU",
                "hardware.plan_gpu_memory_gb=80 hardware.plan_gpu_tflops=400",
            )
        if self.device_map is not None:
            one_of("hardware.device_map", self.device_map, ("auto",))
        at_least("hardware.threads", self.threads, 1)
        at_least("hardware.num_processes", self.num_processes, 1)
        at_least("hardware.micro_batch_size", self.micro_batch_size, 1)
        at_least("hardware.generation_batch_size", self.generation_batch_size, 1)
        at_least("hardware.evaluation_batch_size", self.evaluation_batch_size, 1)


@dataclass
class TrackingConfig:
    """W&B. The API key comes from `wandb login` or WANDB_API_KEY, never from the config."""

    mode: str = setting("offline", enters=RUNTIME)
    """`offline` (files, synced later), `online`, `disabled`."""
    project: str = setting("hyperfitting", enters=RUNTIME)
    """W&B project."""
    entity: str | None = setting(None, enters=RUNTIME)
    """W&B user or team; null: your default."""
    group: str | None = setting(None, enters=RUNTIME)
    """W&B group; null: the sweep's name."""
    tags: list[str] = setting(factory=list, enters=RUNTIME)
    """W&B tags."""
    checkpoint: bool = setting(False, enters=RUNTIME)
    """Upload the tuned parameters as an artifact (0.5 GB for 135M parameters)."""
    timeout: float = setting(10.0, enters=RUNTIME)
    """Maximum wait for the server, in seconds, at the start and the end of a run; what it has not
    accepted by then is sent later by `hyperfit-dashboard sync`."""

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("offline", "online", "disabled"))
        above_zero("tracking.timeout", self.timeout)
