"""YAML as configurations are written in: plain values, no key twice, no aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

from compressm.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads ``1e-3`` as a number (YAML 1.2) and refuses a key that is given twice, and aliases:
    a few of them make a file of gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is not a name", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a safe loader: nothing but plain values
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML ({error.problem}); mend that line") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:  # a date 2026-99-99, say
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None


__all__ = ["parsed"]
