"""A run as a Hydra job: composing its config and executing it, in whatever process."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from omegaconf import DictConfig, open_dict

from hyperfitting.sweep.config import HydraSetup


def compose_job(hydra: HydraSetup, number: int, overrides: Sequence[str]) -> DictConfig:
    """Return the composed config of a run, with its `hydra` node.

    Args:
        hydra: the sweep's Hydra objects.
        number: of the job.
        overrides: of the run, its folder included.
    """
    composed: DictConfig = hydra.context.config_loader.load_sweep_config(
        hydra.config, list(overrides)
    )
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    return composed


def execute_job(hydra: HydraSetup, number: int, overrides: Sequence[str]) -> None:
    """Execute a run as Hydra does; the task writes its outcome into the run's folder."""
    HydraConfig.instance().set_config(hydra.config)
    run_job(
        task_function=hydra.task,
        config=compose_job(hydra, number, overrides),
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=hydra.context,
    )
