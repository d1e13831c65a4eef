"""MkDocs hook: the pages that are made from something else, so that they can't say anything different from it.

`index.md` is the README, `changelog.md` the CHANGELOG, `configuration.md` the schema that parses the YAML file.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

    from kvtiers.config.keys import SettingInfo

_ROOT = Path(__file__).resolve().parent.parent

_CONFIGURATION = """# Configuration

One YAML file, the same keys as LMCache's tiered-cache template; all of them may be left out. `kvtiers config check FILE` prints what
is in force, where each value comes from, and whether it fits the machine. `kvtiers config reference` prints this page as a YAML file
to start from.

Every setting can be overridden by an environment variable: its path in capitals, with `__` between the levels, behind `KVTIERS_`.

```sh
KVTIERS_STORAGE__CPU__BUFFER_SIZE=32Gi
```

Sizes are written `"200Gi"`, `"1.5Ti"`, `"500GB"` or as plain bytes. Wrong input gives one error that lists every problem of the file.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made here. Called by MkDocs once for a build."""
    pages = {
        "index.md": _moved(_read("README.md")),
        "changelog.md": _moved(_read("CHANGELOG.md")),
        "configuration.md": configuration(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def configuration() -> str:
    """The reference of every setting, as Markdown."""
    from kvtiers.config import CacheConfig
    from kvtiers.config.keys import settings_of

    parts = [_CONFIGURATION]
    for section, settings in groupby(settings_of(CacheConfig), key=lambda one: ".".join(one.path[:-1])):
        parts.append(f"\n## {section}\n")
        parts += [_setting(one) for one in settings]
    return "\n".join(parts)


def _setting(one: SettingInfo) -> str:
    unit = f" Unit: {one.unit}." if one.unit not in {"", "size"} else ""
    default = f"`{one.default}`" if one.has_fixed_default else one.default
    return (
        f"### `{one.path[-1]}` {{ #{one.key.replace('_', '-').replace('.', '-')} }}\n\n{one.effect}\n\n"
        f"Default: {default}. Allowed: {one.allowed}.{unit} Override: `{one.env}`.\n"
    )


def _read(name: str) -> str:
    return (_ROOT / name).read_text(encoding="utf-8")


def _moved(text: str) -> str:
    """Links of a file in the root, as they are from a page of the site."""
    text = re.sub(r"\]\(docs/", "](", text)
    return text.replace("](CHANGELOG.md)", "](changelog.md)")
