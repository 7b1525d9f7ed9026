"""Run stages, read logs and make data, for all example programs."""
