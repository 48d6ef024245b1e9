"""Metadata of media files, and JSON: reading, writing, comparing, extracting.

Standard library, Pillow and av only: no jax, no torch, no ComfyUI. What is wrong with a file or a value is said by
``MetadataError``; no other exception leaves this room for a bad file.
"""
