"""`unidad demo`: a page on this machine that draws with a student, beside its source, and between two noises."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from unidad_pl.checks import check_at_least
from unidad_pl.files import expanded


def demo(
    model: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    config: str | None = None,
    device: str = "auto",
) -> str:
    """Serve a page that draws with a few-step student; Ctrl-C ends it.

    Images by seed and number of steps, beside those of the source model, and on the way from one noise to another.
    Nothing is sent anywhere, and only this machine sees the page unless ``host`` says otherwise.

    Args:
        model: a directory that ``unidad export`` wrote, or a checkpoint.
        host: the address to listen on; 0.0.0.0: every one of this machine, for all who reach it, without a password.
        port: null: the first free one from 7860 on.
        open_browser: show the page at once.
        weights: of a checkpoint: ``ema``, ``raw`` or ``auto`` (ema where it has it).
        config: of a checkpoint: its run's config.yaml; null: the one of its run folder.
        device: ``cpu``, ``cuda``, or ``auto``.

    Returns:
        A closing line.

    Raises:
        ModuleNotFoundError: gradio is missing.
        FileNotFoundError, ValueError: the model cannot be loaded; says why.
        OSError: the port is taken.
    """
    check_at_least(1, 65535, port=port)
    place = expanded(model)
    if find_spec("gradio") is None:
        raise ModuleNotFoundError("the demo needs gradio: pip install 'unidad_pl[demo]'")
    from unidad_pl.cli.demo_page import serve  # what loads gradio and torch; --help need not wait
    from unidad_pl.cli.demo_studio import Studio

    serve(Studio(place, weights, config, device), host, port, open_browser)
    return "the demo has ended\n"
