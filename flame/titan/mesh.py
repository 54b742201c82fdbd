"""How the processes of a run share the model, the data and each sequence, and which layouts are refused."""

from dataclasses import fields

from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims


class Layout(ParallelDims):
    """torchtitan's degrees and meshes, with one mesh more: weights are always handled by FSDP2.

    DDP is FSDP2 with shards over one process, that is, with whole copies; tensor parallelism alone is the same.
    Gradients, mixed precision and parameter names are then handled alike in every layout of several processes.
    """

    @classmethod
    def of(cls, dims: ParallelDims) -> "Layout":
        """torchtitan's degrees as a `Layout`, without meshes, which are built when they are first asked for."""
        return cls(**{f.name: getattr(dims, f.name) for f in fields(dims) if f.name[0] != "_"})

    def _mesh_exist(self, name: str, degree: int) -> bool:
        # ParallelDims gives size-1 meshes a fake process group; FSDP needs a real one
        return name == "fsdp" or super()._mesh_exist(name, degree)

    def get_all_one_dimensional_meshes(self) -> dict[str, DeviceMesh]:
        """Meshes of more than one process, without the experts' one.

        The model has no experts, and torch warns that the timeout of its fake process group cannot be set.
        """
        meshes = super().get_all_one_dimensional_meshes()
        return {name: mesh for name, mesh in meshes.items() if name != "efsdp"}

    @property
    def fsdp_enabled(self) -> bool:
        """True for every run of several processes."""
        return self.world_size > 1
