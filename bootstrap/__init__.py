"""The installer behind setup.py. Standard library only, Python 3.8 and newer (demo.py: the environment's Python)."""
