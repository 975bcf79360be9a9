"""Threads that wait do not spin, as tests share their cores; the built site, and a browser to look at it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads its OpenMP
ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium")


def pytest_collection_modifyitems(items):
    """Without Chromium tests marked `browser` are skipped, but fail where SLEEPLIB_TEST_BROWSER is set."""
    if BROWSER is None and not os.environ.get("SLEEPLIB_TEST_BROWSER"):
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="needs chromium"))


@pytest.fixture(scope="module")
def chromium():
    """The system's own Chromium (Debian's ``chromium``), headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder of the built pages."""
    if not os.environ.get("SLEEPLIB_TEST_SITE"):
        built = ROOT / "_build" / "html"
        if not built.is_dir():
            pytest.skip("the book is not built; set SLEEPLIB_TEST_SITE=1 to build it here")
        return built
    out = tmp_path_factory.mktemp("site")
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [tool, "build", ".", "-W", "--keep-going", "--all", "--path-output", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return out / "_build" / "html"
