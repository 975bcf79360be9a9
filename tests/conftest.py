"""Threads that wait do not spin: tests share their cores, and a spinning thread keeps others from working."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads its OpenMP
