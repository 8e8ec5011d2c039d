"""The page in headless Chromium: no message on the console, a slider that moves, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.report.folders import make_run
from unidad_pl.report import write_page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
    "--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom",
]  # fmt: skip
HARNESS = """<!DOCTYPE html><body><iframe src="PAGE" width="WIDTH" height="900"></iframe><pre id="seen"></pre><script>
onload = () => setTimeout(() => {
  const own = document.querySelector("iframe").contentWindow, page = own.document;
  const visible = () => [...page.querySelectorAll(".frames")][0].querySelectorAll(".frame:not([hidden])");
  const shown = () => [visible().length, visible()[0].dataset.title, page.querySelector("output").value];
  const before = shown(), slider = page.querySelector("input[type=range]");
  slider.value = 0;
  slider.dispatchEvent(new own.Event("input"));
  seen.textContent = JSON.stringify({
    before, after: shown(), width: own.innerWidth, content: page.documentElement.scrollWidth,
    plots: page.querySelectorAll(".js-plotly-plot .scatterlayer .trace").length,
    wide: [...page.querySelectorAll(".charts > *")].filter(one => one.scrollWidth > one.clientWidth + 1).length,
    unseen: [...page.images].filter(one => !one.naturalWidth && !one.closest("[hidden]")).length,
  });
}, 3000);
</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_works(width: int, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "a_run_with_quite_a_long_name_of_its_own") for name in ("one", "two")]
    page = write_page(runs, tmp_path / "page.html")
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.replace("PAGE", page.name).replace("WIDTH", str(width)))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert messages == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["before"] == [1, "iteration 20", "iteration 20"]
    assert seen["after"] == [1, "iteration 10", "iteration 10"]
    assert seen["content"] <= seen["width"] <= width
    assert seen["plots"] == 8  # four plots of two runs
    assert seen["wide"] == 0  # a plot that is drawn before its neighbours are there has its share of the width too
    assert seen["unseen"] == 0
