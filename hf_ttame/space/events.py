"""Which wish of `Handlers` each part of the page is, and how many may be answered at once."""

from typing import Any

import gradio as gr

from .handlers import Content, Handlers

OPENING = "coffee"  # the example that is shown at the start
# The colours lie over the picture in the browser: their strength needs no server.
_STRENGTH = """(strength) => {
  document.documentElement.style.setProperty("--tt-strength", strength / 100);
  for (const link of document.querySelectorAll("a[data-strength]")) {
    const url = new URL(link.href);
    url.searchParams.set("strength", Math.round(strength));
    link.href = url.href;
  }
}"""
# Ctrl+V anywhere: gradio's own field pastes by its button alone. Where text is typed, text beside the picture wins.
# The field has no input while it uploads, or after its button for the clipboard was used: the first of its buttons is
# the one for files.
_PASTE = """() => document.addEventListener("paste", async (event) => {
  const [file] = event.clipboardData.files;
  const typing = event.target.closest?.("input, textarea") && event.clipboardData.types.includes("text/plain");
  if (!file || typing) return;
  event.preventDefault();
  const transfer = new DataTransfer();
  transfer.items.add(file);
  const find = (part) => document.querySelector(`#tt-picture ${part}`);
  for (let turn = 0; !find("input[type=file]"); turn++) {
    if (turn === 200) return;  // ten seconds
    find("[data-testid=source-select] button")?.click();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  const input = find("input[type=file]");
  input.files = transfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
})"""

# What runs passes of a backbone takes turns anyway; the quick ones never wait behind them.
_PASSES: dict[str, Any] = {
    "concurrency_id": "passes",
    "concurrency_limit": 4,
    "api_visibility": "private",
    "show_progress": "hidden",
}
_QUICK: dict[str, Any] = {
    "concurrency_id": "quick",
    "concurrency_limit": 16,
    "api_visibility": "private",
    "show_progress": "hidden",
}
_LOADING: dict[str, Any] = {  # apart: a slow download must not keep pictures waiting
    "concurrency_id": "loading",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "show_progress": "minimal",
}
_RISE: dict[str, Any] = {"concurrency_id": "rise", "concurrency_limit": 1, "api_visibility": "private"}
_NOW: dict[str, Any] = {"queue": False, "api_visibility": "private"}
# What becomes of a wish while the one before it is answered. Left out, gradio would drop it.
_LATEST = "always_last"  # the last one follows; for sliders and the like: what was clicked or typed is not kept for it
_EACH = "multiple"  # all are answered, and the handlers see to it that the last one stays


def connect(page: gr.Blocks, parts: dict[str, Any], handlers: Handlers) -> None:
    """Register every event.

    Args:
        page: made with `parts` in it.
        parts: name -> component, by the names that the handlers' content has.
        handlers: what happens.
    """

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
        return show(handlers.explainer(_visitor(request), name, strength, colours))

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

    def compare(first: Any, second: Any, colours: str, request: gr.Request) -> Any:
        # An id can be 0.
        first, second = ("" if wanted is None else wanted for wanted in (first, second))
        return show(handlers.compare(_visitor(request), first, second, colours))

    def rise(
        masks: float, keep: float, colours: str, request: gr.Request, progress: gr.Progress = gr.Progress()
    ) -> Any:
        def tell(done: int, total: int) -> None:
            progress((done, total), desc="RISE", unit="masks")

        tell(0, int(masks))
        return show(handlers.rise(_visitor(request), masks, keep, colours, tell))

    def arm(request: gr.Request) -> None:
        handlers.arm_rise(_visitor(request), stop=False)

    def stop(request: gr.Request) -> None:
        handlers.arm_rise(_visitor(request), stop=True)

    def leave(request: gr.Request) -> None:
        handlers.sessions.leave(_visitor(request))

    look = [parts["strength"], parts["colours"]]
    keep = [parts["keep"], parts["colours"]]
    changed = ("picture", "notice", "bars", "other", "stage", "pair", "first", "second", "report")
    shown = [parts[name] for name in changed]
    measured = [parts["test"], parts["methods"], parts["notice"]]
    pair = [parts["pair"], parts["notice"]]

    # What shows another map is followed by its measurement: the map is there before it.
    first = [
        parts["picture"].input(
            upload,
            [parts["picture"], parts["explainer"], *look],
            shown,
            preprocess=False,  # whatever was uploaded, the handler has words for it
            api_name="upload",
            trigger_mode=_EACH,
            **{**_PASSES, "api_visibility": "undocumented"},
        ),
        parts["examples"].click(example, [parts["explainer"], *look], shown, trigger_mode=_EACH, **_PASSES),
        page.load(first_example, [parts["explainer"], *look], shown, **_PASSES),
        parts["explainer"].input(
            explainer,
            [parts["explainer"], *look],
            shown,
            trigger_mode=_LATEST,
            **_LOADING,
        ),
        parts["bars"].click(choose, look, shown, trigger_mode=_EACH, **_QUICK),
        parts["other"].submit(ask, [parts["other"], *look], shown, trigger_mode=_EACH, **_QUICK),
    ]
    for number, event in enumerate(first):
        # The first has a name, so that a program can measure what it uploaded, as the page does.
        named = {} if number else {"api_name": "measure", "api_visibility": "undocumented"}
        event.then(measure, keep, measured, trigger_mode=_LATEST, **{**_PASSES, **named})
    parts["keep"].change(measure, keep, measured, trigger_mode=_LATEST, **_PASSES)
    parts["strength"].change(None, parts["strength"], None, js=_STRENGTH)
    parts["colours"].change(
        recolour, [parts["keep"], *look], [parts["stage"], *pair, *measured[:2]], trigger_mode=_LATEST, **_PASSES
    )
    gr.on(
        [parts["first"].input, parts["second"].input],
        compare,
        [parts["first"], parts["second"], parts["colours"]],
        pair,
        trigger_mode=_LATEST,
        **_QUICK,
    )
    # Stopping works before RISE's turn has come, too: its flag is cleared when it is asked for, not when it starts.
    parts["run"].click(arm, None, None, **_NOW).then(
        rise, [parts["masks"], *keep], measured, show_progress_on=parts["methods"], **_RISE
    )
    parts["stop"].click(stop, None, None, **_NOW)
    page.load(None, None, None, js=_PASTE)
    page.unload(leave)


def _update(value: Any) -> Any:
    """A part's new content as gradio wants it: choices come as ([(label, value), ...], chosen)."""
    return gr.update(choices=value[0], value=value[1]) if isinstance(value, tuple) else value


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)
