"""Model-agnostic machinery: device modules, weights, plans, the memory registry, the compile cache.

Nothing here imports ComfyUI.
"""
