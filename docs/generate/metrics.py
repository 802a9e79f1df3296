"""docs/metrics.md, from metrics.yaml and aliases.yaml: python docs/generate/metrics.py > docs/metrics.md."""

from pathlib import Path

import yaml
from jinja2 import Template

from rlkit.telemetry.names import ALIASES, GROUPS, LIBRARIES, METRICS, read_resource


def markdown() -> str:
    """The whole page."""
    introduction = yaml.safe_load(read_resource("metrics.yaml"))["introduction"]
    text = Path(__file__).with_suffix(".md.j2").read_text("utf-8")
    page = Template(text, trim_blocks=True, keep_trailing_newline=True)
    return str(
        page.render(introduction=introduction, groups=GROUPS, metrics=METRICS, libraries=LIBRARIES, aliases=ALIASES)
    )


if __name__ == "__main__":
    print(markdown(), end="")
