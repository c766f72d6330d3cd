"""One function on several processes at once, in one torch process group: Ray Train, for RayExecutor.gang.

    driver ──> lead: train() ──> Ray Train's controller ──> member 0: work(resources)   torch.distributed
                                                       ──> member 1: work(resources)   nccl on GPUs, gloo on CPUs

The lead is a worker process like a map's, because Ray Train takes over what belongs to the process that calls it
(SIGINT, loggers) and loads torch and pandas. With the driver goes the lead, and with the lead go the others.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.execute import Raised, Resources, Result, attempt
from storage.errors import ShardError

_SETTINGS = {  # Ray Train reads its settings from the environment
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end, good or bad, is seen; by default 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(10**9),  # places that a map holds are waited for
    "RAY_TRAIN_METRICS_ENABLED": "0",  # nobody asks its Prometheus
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; a node that goes is a member lost
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
}


class MemberRaised(Exception):
    """What a member of the group raised; `raised` is its attempt."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(raised)
        self.raised = raised

    def __str__(self) -> str:
        return f"\n{self.raised.traceback}"


def train(
    work: Callable[[Resources], Result],
    members: int,
    environment: dict[str, str],
    options: dict[str, Any],
    known: set[str],
    resources: Resources,
) -> Result:
    """`work` on `members` processes at the same time; the result of rank 0.

    `environment` is set before a member starts; `options` are what Ray sets aside for each; `known` are the
    placement_groups() before the first attempt. `resources` are a member's but for its device and rank.

    Raises:
        ShardError: a member died.
        Exception: what a member raised, with a cause that shows the member's traceback.
    """
    os.environ.update(_SETTINGS)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchTrainer

    def member() -> Result:
        from ray.train import get_context
        from ray.train.torch import get_device

        context = get_context()
        given = Resources(str(get_device()), resources.threads, context.get_world_rank(), context.get_world_size())
        tried = attempt(work, given)
        if isinstance(tried, Raised):
            raise MemberRaised(tried)
        return tried.result

    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if Path(path).exists())  # the user's scorers
    context = ray.get_runtime_context()
    trainer = TorchTrainer(
        member,
        scaling_config=ScalingConfig(
            num_workers=members,
            use_gpu=bool(options["num_gpus"]),
            resources_per_worker={"CPU": options["num_cpus"], "GPU": options["num_gpus"]},
        ),
        run_config=RunConfig(  # its records go where Ray's logs are; by default to the home folder
            storage_path=os.path.join(context.get_temp_dir(), context.get_session_name(), "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": environment | {"PYTHONPATH": paths}},
        ),
    )
    _release(known)
    try:
        return trainer.fit().return_value  # type: ignore[no-any-return]
    except WorkerGroupError as error:
        reason, cause = judge(error, members)
        raise reason from cause
    except TrainingFailedError as error:  # the controller's: a member died before it could begin
        raise ShardError(f"the {members} members could not begin") from error


def judge(error: Any, members: int) -> tuple[Exception, Exception]:
    """Why Ray Train's WorkerGroupError ended the group: what a member raised, or that some died; and what shows where.

    A recipe that is wrong is wrong in any case. Else, where a member died, what others raised may only say that they
    miss it.
    """
    failures = error.worker_failures.values()
    raised = [failure.raised for failure in failures if isinstance(failure, MemberRaised)]
    first = min(raised, key=lambda each: ("stop", "again", "fail").index(each.then), default=None)
    lost = len(failures) - len(raised)
    if first is None or (lost and first.then != "stop"):
        return ShardError(f"{lost} of {members} members died: killed, out of memory, or crashed"), error
    return first.error, MemberRaised(first)


def placement_groups() -> set[str]:
    """Ids of the places that Ray keeps for this driver's groups."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"
    }


def _release(known: set[str]) -> None:
    """Gives back what a lead that was killed had taken; Ray would keep it until the driver's end.

    Ray Train has a process for that, which needs Ray's dashboard.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in placement_groups() - known:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
