"""The report of an explainer: the facts and figures of its model card, "not measured" where there are none."""

from huggingface_hub.utils import EntryNotFoundError

from ..cards import NOT_MEASURED, card_fields, escape
from .explainers import Explainer

_SECTIONS = (("Figures", "figures"), ("Training", "training"), ("Limits", "limits"), ("Licences", "licences"))


def report(explainer: Explainer) -> str:
    """Markdown without pictures or links: everything that comes from the explainer's files is escaped."""
    try:
        fields = card_fields(explainer.folder)
    except (ValueError, EntryNotFoundError) as error:
        return f"## {escape(explainer.name)}\n\n**{NOT_MEASURED}**: its figures cannot be read: {escape(error)}"
    parts = [f"## {fields['title']}", fields["summary"], f"| | |\n|---|---|\n{fields['facts']}"]
    parts += [f"> {escape(remark)}" for remark in explainer.remarks]
    parts += [f"### {title}\n\n{fields[name]}" for title, name in _SECTIONS]
    return "\n\n".join(parts)
