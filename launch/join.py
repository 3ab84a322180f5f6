"""`thinwire.init()`: join the job in one line, from any script."""

from __future__ import annotations

from thinwire.dist.mesh import MeshSettings
from thinwire.dist.world import World, WorldSettings, join
from thinwire.launch.env import detect


def init(settings: WorldSettings | None = None, mesh: MeshSettings | None = None) -> World:
    """Join the job that torchrun, mpirun, srun or the lab started this process in; else be a job of one. Collective.

    Call it before anything else that initialises torch.distributed. Under mpirun it starts MPI to find the others and
    ends it again; a script that uses MPI itself imports mpi4py.MPI first, and keeps it.

    Args:
        settings: deadlines, interface, device and threads; default: WorldSettings().
        mesh: the levels of the machine; default: detected.
    Raises:
        LaunchError: a launcher's variable is missing or malformed, or two launchers contradict each other.
        RendezvousError: the ranks did not find each other.

    Example:
        with thinwire.init() as world:
            model = DistributedDataParallel(model.to(world.device))
            thinwire.allreduce(model, queue=world.queue)
    """
    return join(detect(), settings or WorldSettings(), mesh or MeshSettings())
