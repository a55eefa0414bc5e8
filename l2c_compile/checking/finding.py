"""The finding: what the proof reports where a graph is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx.node import Node

from l2c_compile.graphs.nodes import evaluation_of, module_path


@dataclass(frozen=True)
class Finding:
    """Something that a graph does and should not do, or that it should do and does not."""

    check: str
    """The part of the proof that fails: form, values, sites, work, draws, constants, notes or memory."""
    message: str
    node: str | None = None
    """The name of the first node where the fault shows."""
    evaluation: int | None = None
    """The evaluation that the node belongs to."""
    site: str | None = None

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def finding_at(node: Node, check_name: str, what: str, site: str | None = None) -> Finding:
    """Return a finding at a node, with its evaluation and module path."""
    evaluation = evaluation_of(node)
    module = module_path(node)
    place = "" if evaluation is None else f" of evaluation {evaluation}"
    inside = f" in '{module}'" if module else ""
    return Finding(check_name, f"node '{node.name}'{place}{inside} {what}", node.name, evaluation, site)
