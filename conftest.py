"""Chapters are checked as they were built: without live widgets, with one order of sets."""

import os

os.environ.setdefault("SLEEPLIB_BUILDING", "1")
os.environ.setdefault("PYTHONHASHSEED", "0")
