"""Read YAML from a file or an option that may come from anyone.

Aliases are refused: a few hundred bytes of them expand to gigabytes.
"""

from typing import Any

import yaml

from exporter.errors import InputError, short
from exporter.foreign import DEPTH, check_digits

#: The largest YAML text, in bytes; the recipes of the tool have up to 4,000.
YAML_BYTES = 100_000
#: Integers have 64 bits, as in torch.
_LARGEST_INTEGER = (1 << 63) - 1


def parse_yaml(content: bytes | str, subject: object, remedy: str) -> Any:
    """Parse one YAML document in UTF-8.

    Raises InputError for a text over `YAML_BYTES`, aliases, duplicate keys, nesting deeper than
    `DEPTH`, and integers of more than 64 bits.
    """
    if len(content) > YAML_BYTES:
        problem = f"has {len(content):,} bytes of YAML; the limit is {YAML_BYTES:,}"
        raise InputError(subject, problem, remedy)
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an invalid date
        reason = " ".join(str(error).split())
        raise InputError(subject, f"is not valid YAML ({reason})", remedy) from error


class _Loader(yaml.SafeLoader):
    """The safe loader, with limits and without aliases and duplicate keys."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        if self._depth == DEPTH:
            problem = f"nested deeper than the limit of {DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            seen = set[Any]()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    problem = f"the key {short(key)} is there twice"
                    mark = key_node.start_mark
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
                seen.add(key)
        return found


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    check_digits(node.value)
    value: int = loader.construct_yaml_int(node)
    if abs(value) > _LARGEST_INTEGER:
        raise yaml.MarkedYAMLError(
            problem=f"the integer {node.value} has more than 64 bits",
            problem_mark=node.start_mark,
        )
    return value


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    check_digits(node.value)
    value: float = loader.construct_yaml_float(node)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
