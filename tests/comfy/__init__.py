"""Tests of the ComfyUI-facing half: units without a server, and one real server for all tests marked ``server``."""
