"""What Ray's public calls do not reach: reservations of dead actors, and the actor that controls a training.

Ray frees the placement group of a dead actor only when the whole job ends. Ray Train's own cleaner would do so earlier,
but asks the dashboard's server who is alive, which an embedded Ray has not: the next training would wait for ever for
CPUs that nobody uses. Who created a group is in the control service's table and in no public call.
"""

import os
import signal
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group


def kill_train_controllers() -> int:
    """Kill the actors that control this job's trainings, with kill -9; returns how many. Whoever awaits one goes on.

    Ray Train puts them on the node of the process that started the training, and gives nobody their handle.
    """
    job = ray.get_runtime_context().get_job_id()
    table: Any = state.actor_table(None, actor_state_name="ALIVE")
    found = [row for row in table.values() if row["ActorClassName"] == "TrainController" and row["JobID"] == job]
    for row in found:
        os.kill(row["Pid"], signal.SIGKILL)
    return len(found)


def free_orphaned_reservations() -> int:
    """Remove the placement groups of this job whose creator is dead; returns how many."""
    internal: Any = state
    accessor = internal._connect_and_get_accessor()
    table = getattr(gcs_pb2, "PlacementGroupTableData")  # noqa: B009  the module has no stub
    job = ray.get_runtime_context().get_job_id()
    orphans = []
    for packed in accessor.get_placement_group_table():
        group = table.FromString(packed)
        gone = group.state == table.REMOVED
        if group.creator_actor_dead and not gone and group.creator_job_id.hex() == job:
            orphans.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    for orphan in orphans:
        remove_placement_group(orphan)
    return len(orphans)
