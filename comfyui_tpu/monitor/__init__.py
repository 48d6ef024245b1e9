"""What the machine and its TPU chips are doing, read from outside: psutil and the TPU runtime's metrics service.

Nothing here imports JAX, torch or ComfyUI: watching must neither take the TPU nor slow the one who uses it.
"""
