"""The page, with gradio: components, and which wish of `Handlers` each of them is."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..demo import PHOTOGRAPHS
from . import views
from .explainers import SHIPPED, Explainers
from .handlers import MAX_MASKS, Content, Handlers
from .report import report
from .routes import picture_routes
from .sessions import Sessions
from .uploads import MAX_BYTES, Sweeper

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at import
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the Space needs the package gradio; run: pip install 'hf-ttame[space]'") from error

STRENGTH, COLOURS, KEEP, MASKS = 55, "spectrum", 50, 500
OPENING = "coffee"  # the example that is shown at the start
_FILES = Path(__file__).parent
_CLICKED = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-%s]");
  if (button) trigger("click", { chosen: button.dataset.%s });
});
"""
# The colours lie over the picture in the browser: their strength needs no server.
_STRENGTH = """(strength) => {
  document.documentElement.style.setProperty("--tt-strength", strength / 100);
  for (const link of document.querySelectorAll("a[data-strength]")) {
    const url = new URL(link.href);
    url.searchParams.set("strength", Math.round(strength));
    link.href = url.href;
  }
}"""
_HEAD = '<meta name="robots" content="noindex"><meta name="color-scheme" content="light dark">'


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
            "<footer class='tt-footer'>Pictures stay in this server's memory while you look at them, and nowhere "
            "else. A map shows what this classifier used, not what is true.</footer>"
        )
        _connect(page, parts, handlers)
    return page.queue(max_size=64, api_open=False)


def _picture_parts(parts: dict[str, Any], handlers: Handlers, models: Sequence[str]) -> None:
    parts["picture"] = gr.Image(
        sources=["upload", "clipboard", "webcam"],
        height=150,
        label="Your picture",
        show_label=False,
        buttons=[],
        placeholder="Drop a picture here\nor click to choose one",
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
    local = ", or a folder" if handlers.explainers.allow_folders else ""
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
    gr.HTML("<h2>Test it: hide and see</h2><p>If the map is right, its top alone keeps the confidence, and the "
            "picture without it loses it. Each number is a real pass of the classifier.</p>")  # fmt: skip
    parts["keep"] = gr.Slider(1, 100, KEEP, step=1, label="Keep the top, % of the pixels", elem_id="tt-keep")
    parts["test"] = gr.HTML("", elem_id="tt-test", min_height=120)
    gr.HTML("<h2>Beside other methods</h2><p>The same picture, class and share of pixels for all.</p>")
    parts["methods"] = gr.HTML("", elem_id="tt-methods", min_height=120)
    with gr.Row(elem_classes="tt-controls"):
        parts["masks"] = gr.Slider(
            100, MAX_MASKS, MASKS, step=100, label="Masks of RISE: passes of the classifier", elem_id="tt-masks"
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


def _connect(page: gr.Blocks, parts: dict[str, Any], handlers: Handlers) -> None:
    changing = ("picture", "notice", "bars", "other", "stage", "pair", "first", "second", "report")
    every = [parts[name] for name in changing]
    look = [parts["strength"], parts["colours"]]
    # What runs passes of a backbone takes turns at its lock anyway; the others never wait behind them.
    passes: dict[str, Any] = {"concurrency_id": "passes", "concurrency_limit": 4}
    quick: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": 16, "show_progress": "hidden"}
    private: dict[str, Any] = {"api_visibility": "private"}

    def show(content: Content) -> Any:
        if not content:
            return gr.skip()
        return {parts[name]: _update(value) for name, value in content.items()}

    def upload(file: dict[str, Any] | None, explainer: str, strength: int, colours: str, request: gr.Request) -> Any:
        return show(handlers.upload(_visitor(request), file, explainer, strength, colours))

    def example(explainer: str, strength: int, colours: str, event: gr.EventData, request: gr.Request) -> Any:
        return show(handlers.example(_visitor(request), str(event.chosen), explainer, strength, colours))

    def first_example(explainer: str, strength: int, colours: str, request: gr.Request) -> Any:
        return show(handlers.example(_visitor(request), OPENING, explainer, strength, colours))

    def explainer(name: str, strength: int, colours: str, request: gr.Request) -> Any:
        return show(handlers.explainer(_visitor(request), name or "", strength, colours))

    def choose(strength: int, colours: str, event: gr.EventData, request: gr.Request) -> Any:
        chosen = str(event.chosen)
        class_id = int(chosen) if chosen.isdecimal() else None
        return show(handlers.choose_class(_visitor(request), class_id, strength, colours))

    def ask(name: str, strength: int, colours: str, request: gr.Request) -> Any:
        return show(handlers.ask_class(_visitor(request), name, strength, colours))

    def measure(keep: float, colours: str, request: gr.Request) -> Any:
        return show(handlers.measure(_visitor(request), keep, colours))

    def recolour(keep: float, strength: int, colours: str, request: gr.Request) -> Any:
        return show(handlers.recolour(_visitor(request), keep, strength, colours))

    def compare(first: str, second: str, colours: str, request: gr.Request) -> Any:
        return show(handlers.compare(_visitor(request), first or "", second or "", colours))

    def rise(
        masks: float, keep: float, colours: str, request: gr.Request, progress: gr.Progress = gr.Progress()
    ) -> Any:
        progress(0.0, desc="RISE")
        told = lambda done, total: progress((done, total), desc="RISE", unit="masks")  # noqa: E731
        return show(handlers.rise(_visitor(request), masks, keep, colours, told))

    def arm(request: gr.Request) -> None:
        handlers.arm_rise(_visitor(request), stop=False)

    def stop(request: gr.Request) -> None:
        handlers.arm_rise(_visitor(request), stop=True)

    def leave(request: gr.Request) -> None:
        handlers.sessions.leave(_visitor(request))

    measured = [parts["test"], parts["methods"], parts["notice"]]
    picture = parts["picture"].input(
        upload, [parts["picture"], parts["explainer"], *look], every, preprocess=False, api_name="upload",
        api_visibility="undocumented", show_progress_on=parts["stage"], **passes,
    )  # fmt: skip
    shown = [
        picture,
        parts["examples"].click(
            example, [parts["explainer"], *look], every, show_progress="hidden", **passes, **private
        ),
        page.load(first_example, [parts["explainer"], *look], every, show_progress="hidden", **passes, **private),
        parts["explainer"].input(
            explainer, [parts["explainer"], *look], every, show_progress_on=parts["stage"], **passes, **private
        ),
        parts["bars"].click(choose, look, every, api_visibility="private", trigger_mode="always_last", **quick),
        parts["other"].submit(ask, [parts["other"], *look], every, **private, **quick),
    ]
    for event in shown:
        event.then(measure, [parts["keep"], parts["colours"]], measured, show_progress="hidden", **passes, **private)
    parts["keep"].change(
        measure, [parts["keep"], parts["colours"]], measured, trigger_mode="always_last", show_progress="hidden",
        **passes, **private,
    )  # fmt: skip
    parts["strength"].change(None, parts["strength"], None, js=_STRENGTH)
    parts["colours"].change(
        recolour,
        [parts["keep"], *look],
        every,
        show_progress="hidden",
        trigger_mode="always_last",
        **passes,
        **private,
    )
    gr.on(
        [parts["first"].input, parts["second"].input],
        compare, [parts["first"], parts["second"], parts["colours"]], [parts["pair"], parts["notice"]],
        trigger_mode="always_last", **private, **quick,
    )  # fmt: skip
    parts["run"].click(arm, None, None, queue=False, **private).then(
        rise, [parts["masks"], parts["keep"], parts["colours"]], measured, show_progress_on=parts["methods"],
        concurrency_id="rise", concurrency_limit=1, **private,
    )  # fmt: skip
    parts["stop"].click(stop, None, None, queue=False, **private)
    page.unload(leave)


def _update(value: Any) -> Any:
    """A part's new content as gradio wants it: choices come as ([(label, value), ...], chosen)."""
    return gr.update(choices=value[0], value=value[1]) if isinstance(value, tuple) else value


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)


def launch(model: str = SHIPPED, host: str | None = None, port: int | None = None) -> None:
    """Run the Space until it is interrupted; arguments and errors as of `running`."""
    with running(model, host, port, quiet=False) as page:
        page.block_thread()


@contextmanager
def running(
    model: str = SHIPPED, host: str | None = None, port: int | None = None, quiet: bool = True
) -> Iterator[gr.Blocks]:
    """The Space, served from threads of this process while the block runs; `local_url` is its address.

    Args:
        model: the explainer that is shown first: SHIPPED, a Hub id or a folder.
        host: address to listen on; None: this machine alone, or as GRADIO_SERVER_NAME says.
        port: None: the first free one from 7860 on, or as GRADIO_SERVER_PORT says.
        quiet: print nothing.

    Raises:
        ValueError: the explainer cannot be loaded.
        OSError: the port is taken.
    """
    address = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    at_home = address in ("127.0.0.1", "localhost", "::1") and "SPACE_ID" not in os.environ
    with tempfile.TemporaryDirectory(prefix="ttame-space-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads; gradio reads it whenever it needs it
        sessions = Sessions()
        explainers = Explainers(at_home, forgotten=sessions.forget_explainer)
        explainers.get(model, trusted=True)
        examples = {file.stem: file for file in sorted(PHOTOGRAPHS.glob("*.jpg"))}
        sweeper = Sweeper(Path(folder), also=sessions.forget)
        handlers = Handlers(explainers, sessions, sweeper, examples)
        page = build(handlers, [model] if model == SHIPPED else [model, SHIPPED])
        sweeper.start()
        try:
            page.launch(
                server_name=host,
                server_port=port,
                quiet=quiet,
                prevent_thread_lock=True,
                theme=_theme(),
                css_paths=_FILES / "style.css",
                head=_HEAD,
                app_kwargs={"routes": picture_routes(sessions)},
                max_file_size=MAX_BYTES,
                state_session_capacity=256,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                share=False,
            )
            yield page
        finally:
            sweeper.stopped.set()
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="md",
    )
