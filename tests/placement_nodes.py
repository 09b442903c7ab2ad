"""Small graphs with what the placement reads of a task, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Node", "Nodes"]


@dataclass(eq=False, repr=False)
class Node:
    key: Any
    priority: tuple[int, ...]
    dependencies: set[Node] = field(default_factory=set)
    dependents: set[Node] = field(default_factory=set)


class Nodes:
    """Nodes are added in order of priority, inputs first."""

    def __init__(self) -> None:
        self.nodes: dict[Any, Node] = {}

    def add(self, key: Any, *inputs: Any) -> Node:
        node = Node(key, (0, len(self.nodes)))
        self.nodes[key] = node
        for name in inputs:
            node.dependencies.add(self.nodes[name])
            self.nodes[name].dependents.add(node)
        return node

    @property
    def roots(self) -> dict[Any, Node]:
        return {key: node for key, node in self.nodes.items() if not node.dependencies}
