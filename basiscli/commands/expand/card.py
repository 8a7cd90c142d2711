"""The card of a plain LoRA adapter that `basis expand` made; it has no report, and its card has no figures."""

from __future__ import annotations

from typing import Any

from basiscli.checkpoints.source import is_hub_id
from basiscli.version import __version__

_TEXT = """---
{front}---

# {title}

A plain LoRA adapter, written out by `basis expand` ({version}).

```python
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{title}")
```
"""


def expanded_card(config: dict[str, Any], title: str) -> bytes:
    """Return `README.md` for an adapter with this PEFT config."""
    import yaml

    base = str(config.get("base_model_name_or_path") or "")
    named = {"base_model": [base], "base_model_relation": "adapter"} if is_hub_id(base) and "@" not in base else {}
    front = yaml.safe_dump(named | {"library_name": "peft", "tags": ["lora", "basis", "expand"]}, sort_keys=False)
    shown = base if named else "the base"  # a path is nobody else's business
    return _TEXT.format(front=front, title=title, version=__version__, base=shown).encode()
