"""Pure JAX functions. Nothing here imports torch or ComfyUI."""
