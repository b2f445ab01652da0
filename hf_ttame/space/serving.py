"""Run the page on a server of its own."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from ..demo import PHOTOGRAPHS
from .explainers import SHIPPED, Explainers
from .handlers import Handlers
from .layout import build
from .routes import picture_routes
from .sessions import Sessions
from .uploads import MAX_BYTES, PREFIX, Sweeper, sweep_dead

_FILES = Path(__file__).parent


def launch(model: str = SHIPPED, host: str | None = None, port: int | None = None) -> None:
    """Run the Space until it is interrupted; arguments and errors as of `running`."""
    # Ended by whoever runs the machine, too, it leaves no upload behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running(model, host, port) as page:
        print(f"the Space is at {page.local_url}; Ctrl-C ends it", flush=True)
        page.block_thread()


@contextmanager
def running(model: str = SHIPPED, host: str | None = None, port: int | None = None) -> Iterator[gr.Blocks]:
    """The Space, served from threads of this process while the block runs; `local_url` is its address.

    Args:
        model: the explainer that is shown first: SHIPPED, a Hub id or a folder.
        host: address to listen on; None: this machine alone, or as GRADIO_SERVER_NAME says.
        port: None: the first free one from 7860 on, or as GRADIO_SERVER_PORT says.

    Raises:
        ValueError: the explainer cannot be loaded.
        OSError: the port is taken.
    """
    address = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    at_home = address in ("127.0.0.1", "localhost", "::1") and "SPACE_ID" not in os.environ
    # gradio would sum up all its past events again after each one, for a page of statistics that is off here.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    sweep_dead()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads; gradio reads it whenever it needs it
        sessions = Sessions()
        sweeper = Sweeper(Path(folder), also=sessions.forget)
        sweeper.start()  # first: loading an explainer can take longer than an unused folder may stay
        page = None
        try:
            explainers = Explainers(at_home, forgotten=sessions.forget_explainer)
            explainers.get(model, trusted=True)
            examples = {file.stem: file for file in sorted(PHOTOGRAPHS.glob("*.jpg"))}
            handlers = Handlers(explainers, sessions, sweeper, examples)
            handlers.warm_up(model)
            page = build(handlers, [model] if model == SHIPPED else [model, SHIPPED])
            _launch(page, sessions, host, port)
            yield page
        finally:
            sweeper.stopped.set()
            if page is not None:
                page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]


def _launch(page: gr.Blocks, sessions: Sessions, host: str | None, port: int | None) -> None:
    try:
        page.launch(
            server_name=host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            theme=_theme(),
            css_paths=_FILES / "style.css",
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
    except OSError as error:
        raise OSError(f"port {port or 'in the range of gradio'} is taken; give another with --port") from error


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="md",
    )
