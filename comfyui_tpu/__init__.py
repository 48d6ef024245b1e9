"""ComfyUI on TPU: stock Diffusers pipelines drive, JAX on the TPU computes, ComfyUI shows.

Rooms, importing only downwards: ``comfy`` (everything that touches ComfyUI) → ``models`` (facts about each model
family) → ``runtime`` (device modules, weights, mesh, memory) → ``ops`` (pure JAX functions). Beside them ``monitor``,
used by ``comfy`` only: it watches from outside and imports neither JAX nor torch.
"""

__version__ = "0.1.0"
