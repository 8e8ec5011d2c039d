"""The backbone that docs/backbones.md adds in one file conforms, by the test that the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text()
shown: dict[str, Any] = {"__name__": __name__}
for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    exec(block, shown)

TestPixArt = shown["TestPixArt"]
