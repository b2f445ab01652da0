"""The page, with gradio: its parts and how they are arranged. What they do: see `events`."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from . import views
from .events import connect
from .explainers import SHIPPED
from .handlers import MAX_MASKS, Handlers
from .report import report

STRENGTH, COLOURS, KEEP, MASKS = 55, "spectrum", 50, 500
_CLICKED = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-%s]");
  if (button) trigger("click", { chosen: button.dataset.%s });
});
"""


def build(handlers: Handlers, models: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        handlers: what it does.
        models: explainers to choose from; the first is shown at the start.
    """
    parts: dict[str, Any] = {}
    with gr.Blocks(title="T-TAME", analytics_enabled=False, delete_cache=(60, 300), fill_width=True) as page:
        gr.HTML(
            "<header class='tt-header'><h1>T-TAME</h1><p>Which pixels did the classifier use? One pass answers, for "
            "any of its classes.</p></header>"
        )
        with gr.Row(elem_classes="tt-page"):
            with gr.Column(scale=1, min_width=280, elem_classes="tt-side"):
                _picture_parts(parts, handlers, models)
            with gr.Column(scale=3, min_width=320, elem_classes="tt-main"), gr.Tabs():
                with gr.Tab("Explain"):
                    _explain_parts(parts)
                with gr.Tab("Two classes"):
                    _pair_parts(parts)
                with gr.Tab("Report"):
                    first = handlers.explainers.get(models[0], trusted=True)
                    parts["report"] = gr.Markdown(report(first), elem_id="tt-report")
        gr.HTML(
            "<footer class='tt-footer'>An upload lies in a temporary folder of this server until half a minute after "
            "it was read, or for five minutes if it never was; then in memory only, while you look at it. A map shows "
            "what this classifier used, not what is true.</footer>"
        )
        connect(page, parts, handlers)
    return page.queue(max_size=64, api_open=False)


def _picture_parts(parts: dict[str, Any], handlers: Handlers, models: Sequence[str]) -> None:
    parts["picture"] = gr.Image(
        sources=["upload", "clipboard", "webcam"],
        height=150,
        label="Your picture",
        show_label=False,
        buttons=[],
        placeholder="Drop or choose a picture",
        elem_id="tt-picture",
        webcam_options=gr.WebcamOptions(mirror=False),
    )
    parts["examples"] = gr.HTML(
        views.examples(list(handlers.examples.values())), js_on_load=_CLICKED % ("example", "example")
    )
    parts["notice"] = gr.HTML("", elem_id="tt-notice")
    parts["bars"] = gr.HTML("", js_on_load=_CLICKED % ("class", "class"), elem_id="tt-classes")
    parts["other"] = gr.Textbox(
        label="Another class", placeholder="Name or number, then Enter", max_lines=1, elem_id="tt-other"
    )
    names = {SHIPPED: "EfficientNet-Lite0 (shipped)"}
    local = ", or a folder" if handlers.explainers.at_home else ""
    parts["explainer"] = gr.Dropdown(
        [(names.get(name, name), name) for name in models],
        value=models[0],
        label="Explainer",
        info=f"Choose one, or type a Hub id{local}, then Enter",
        allow_custom_value=True,
        elem_id="tt-explainer",
    )


def _explain_parts(parts: dict[str, Any]) -> None:
    parts["stage"] = gr.HTML("", elem_id="tt-stage", min_height=240)
    with gr.Row(elem_classes="tt-controls"):
        parts["strength"] = gr.Slider(0, 100, STRENGTH, step=1, label="Colour strength, %", elem_id="tt-strength")
        parts["colours"] = gr.Radio(
            ["spectrum", "viridis", "inferno", "grey"], value=COLOURS, label="Colours", elem_id="tt-colours"
        )
    gr.HTML(
        "<h2>Test it: hide and see</h2><p>The top of a good map keeps the confidence; hiding it takes it away. Each "
        "number is a real pass.</p>"
    )
    parts["keep"] = gr.Slider(1, 100, KEEP, step=1, label="Keep the top, % of the pixels", elem_id="tt-keep")
    parts["test"] = gr.HTML("", elem_id="tt-test", min_height=120)
    gr.HTML("<h2>Beside other methods</h2><p>The same picture, class and share of pixels for all.</p>")
    parts["methods"] = gr.HTML("", elem_id="tt-methods", min_height=120)
    with gr.Row(elem_classes="tt-controls"):
        parts["masks"] = gr.Slider(
            100, MAX_MASKS, MASKS, step=100, label="Masks of RISE, a pass each", elem_id="tt-masks"
        )
        parts["run"] = gr.Button("Run RISE", variant="primary", scale=0, min_width=120, elem_id="tt-run")
        parts["stop"] = gr.Button("Stop", scale=0, min_width=90, elem_id="tt-stop")


def _pair_parts(parts: dict[str, Any]) -> None:
    with gr.Row(elem_classes="tt-controls"):
        for name, label in (("first", "One class"), ("second", "Another class")):
            parts[name] = gr.Dropdown(
                [],
                label=label,
                info="Choose, or type a name, then Enter",
                allow_custom_value=True,
                elem_id=f"tt-{name}",
            )
    parts["pair"] = gr.HTML("", elem_id="tt-pair", min_height=240)
