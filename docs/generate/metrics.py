"""docs/metrics.md, from rlkit/telemetry/metrics.yaml and aliases.yaml: python docs/generate/metrics.py."""

from pathlib import Path

import yaml
from jinja2 import Template

from rlkit.telemetry.names import ALIASES, GROUPS, LIBRARIES, METRICS, read_resource

HERE = Path(__file__).parent


def markdown() -> str:
    """The whole page."""
    introduction = yaml.safe_load(read_resource("metrics.yaml"))["introduction"]
    page = Template((HERE / "metrics.md.j2").read_text("utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return page.render(
        introduction=introduction, groups=GROUPS, metrics=METRICS, libraries=LIBRARIES, aliases=ALIASES
    )


if __name__ == "__main__":
    (HERE.parent / "metrics.md").write_text(markdown(), "utf-8")
