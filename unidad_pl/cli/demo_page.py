"""The demo's page: what people choose, and how the pictures are shown."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is sent anywhere
import gradio as gr

from unidad_pl.cli.demo_studio import MOST_IMAGES, SOURCE_STEPS, Studio
from unidad_pl.data.pictures import grid, write_png

SHOWN = 128
"""Pixels that a picture is shown with at least, each of its own enlarged."""
COLUMNS = 8


class Page:
    """The page of a studio, and the folder of the files that it hands out.

        >>> page = Page(studio, Path("files")).blocks()  # doctest: +SKIP

    Args:
        studio: draws.
        folder: for grids and animations.
    """

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.folder = studio, folder
        self.trained_steps = len(studio.student.sampler)

    # -- what the buttons do -------------------------------------------------------------------------------------

    def sample(self, seed: float, count: float, steps: float, prompt: str | None = None) -> tuple[list[Any], str]:
        """Pictures with their seeds, and the grid's file."""
        images = self.studio.sample(int(seed), int(count), int(steps), prompt)
        labels = [f"seed {int(seed) + i}" for i in range(len(images))]
        name = f"seeds_{int(seed)}_{int(seed + count) - 1}_steps_{int(steps)}"
        return _gallery(images, labels), self._grid(images, None, name)

    def compare(
        self, seed: float, count: float, steps: float, source_steps: float, prompt: str | None = None
    ) -> tuple[list[Any], str, str]:
        """Pairs of pictures, student and source, the grid's file, and a sentence about the source."""
        ours = self.studio.sample(int(seed), int(count), int(steps), prompt)
        seeds = [int(seed) + i for i in range(len(ours))]
        name, student = f"beside_source_{seeds[0]}_{seeds[-1]}", _gallery(ours, [f"student {s}" for s in seeds])
        if self.studio.original.network is None:
            return student, self._grid(ours, None, name), self.studio.original.why
        theirs = self.studio.source_samples(int(seed), int(count), int(source_steps), prompt)
        source = _gallery(theirs, [f"source {s}" for s in seeds])
        pairs = [picture for pair in zip(student, source, strict=True) for picture in pair]
        said = f"Source: {self.studio.original.why}, {int(source_steps)} steps of Heun's from the same first noise."
        return pairs, self._grid(ours, theirs, name), said

    def walk(
        self, first: float, last: float, count: float, steps: float, prompt: str | None = None
    ) -> tuple[list[Any], str, str]:
        """Pictures on the way, the animation's file, and the grid's."""
        images = self.studio.walk(int(first), int(last), int(count), int(steps), prompt)
        labels = [f"{100 * i // (len(images) - 1)} %" for i in range(len(images))]
        name, pictures = f"walk_{int(first)}_{int(last)}", _gallery(images, labels)
        animation = self.folder / f"{name}.gif"
        frames = [picture for picture, _ in (*pictures, *pictures[-2:0:-1])]  # there and back
        frames[0].save(animation, save_all=True, append_images=frames[1:], duration=100, loop=0)
        return pictures, str(animation), self._grid(images, None, name)

    def _grid(self, images: Tensor, above: Tensor | None, name: str) -> str:
        path = self.folder / f"{name}.png"
        write_png(grid(images, above, min(COLUMNS, len(images)), 1), path)
        return str(path)

    # -- what it looks like --------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """The page."""
        student = self.studio.student
        _, height, width = student.network.image_shape
        size = "" if self.studio.takes_prompts else f", {height} x {width} pixels"
        with gr.Blocks(title=f"unidad: {self.studio.name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.Markdown(
                f"# {self.studio.name}\nA student of {self.trained_steps} steps at iteration {student.iteration}, "
                f"{student.weights} weights{size}. Equal seeds give equal pictures."
            )
            with gr.Tab("Sample"):
                draw = self._tab(
                    self.sample, [_seed("First seed", 0), _count("Pictures", 16, 1), self._steps()],
                    [_pictures(), gr.DownloadButton("Download the grid", render=False)],
                )  # fmt: skip
            if not self.studio.takes_prompts:
                page.load(**draw)  # a page that opens shows what the model draws
            with gr.Tab("Beside the source"):
                many = gr.Slider(1, 100, SOURCE_STEPS, step=1, label="Steps of the source", render=False)
                self._tab(
                    self.compare, [_seed("First seed", 0), _count("Pairs", 4, 1), self._steps(), many],
                    [_pictures(), gr.DownloadButton("Download the grid", render=False), gr.Markdown(render=False)],
                )  # fmt: skip
            with gr.Tab("Walk"):
                self._tab(
                    self.walk,
                    [_seed("From seed", 0), _seed("To seed", 1), _count("Pictures", 16, 2), self._steps()],
                    [_pictures(), gr.DownloadButton("Download the animation", render=False),
                     gr.DownloadButton("Download the grid", render=False)],
                )  # fmt: skip
        return page

    def _steps(self) -> gr.Slider:
        return gr.Slider(1, self.studio.most_steps, self.trained_steps, step=1, label="Steps K", render=False)

    def _tab(self, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
        """Lay out one tab.

        Returns:
            What its button does.
        """
        with gr.Row():
            for one in inputs:
                one.render()
        numbers = [one.label for one in inputs]
        if self.studio.takes_prompts:
            token = self.studio.student.token
            inputs.append(gr.Textbox(f"a photo of a {token} " if token else "", label="Prompt"))
        button = gr.Button("Draw", variant="primary")
        for one in outputs:
            one.render()
        # One at a time: the pictures of several people would wait for each other anyway.
        draw: dict[str, Any] = dict(
            fn=_in_words(function, numbers), inputs=inputs, outputs=outputs, concurrency_id="model"
        )
        button.click(**draw, api_name=function.__name__)
        return draw


def _in_words(function: Callable[..., Any], numbers: Sequence[str]) -> Callable[..., Any]:
    """``function``, whose refusals the page shows; its first values are called ``numbers``, and may be left empty."""

    def shown(*values: Any) -> Any:
        try:
            for name, value in zip(numbers, values, strict=False):
                if value is None:
                    raise ValueError(f"{name} is empty: write a whole number")
            return function(*values)
        except (ValueError, RuntimeError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return shown


def _seed(label: str, value: int) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=0, render=False)


def _count(label: str, value: int, least: int) -> gr.Slider:
    return gr.Slider(least, MOST_IMAGES, value, step=1, label=label, render=False)


def _pictures() -> gr.Gallery:
    return gr.Gallery(
        show_label=False, columns=COLUMNS, object_fit="contain", format="png", height="auto", render=False
    )


def _gallery(images: Tensor, labels: list[str]) -> list[tuple[Any, str]]:
    """Pictures [N, 3, H, W] uint8 as PIL images, small ones enlarged, with their labels."""
    from PIL import Image

    scale = max(1, SHOWN // images.shape[-1])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).contiguous().numpy()
    return [(Image.fromarray(image), label) for image, label in zip(large, labels, strict=True)]


def serve(studio: Studio, host: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # else fonts are downloaded
    with tempfile.TemporaryDirectory(prefix="unidad_demo_") as folder:
        page = Page(studio, Path(folder)).blocks()
        # Quiet: gradio would say how to make a public link, and none is ever made here.
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, share=False, theme=theme, footer_links=[],
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, allowed_paths=[folder], quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
        sys.stdout.write(f"the demo is at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        page.block_thread()
