"""Tests of setup.py and bootstrap/: no network, no real installation."""
