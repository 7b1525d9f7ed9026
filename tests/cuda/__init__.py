"""Tests on a GPU; tests/conftest.py marks them `cuda`."""
