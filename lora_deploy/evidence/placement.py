"""Which provider runs each node of a loaded graph: what onnxruntime gave to another than the one that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_N_LISTED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Nodes by provider."""

    provider: str
    """Full name of the provider that was asked for."""
    n_nodes: Mapping[str, int]
    """By provider; empty where this onnxruntime does not tell."""
    fell_back: tuple[str, ...] = ()
    """Operator and name of every node that another provider runs."""

    @property
    def is_known(self) -> bool:
        """Whether onnxruntime told."""
        return bool(self.n_nodes)

    @property
    def summary(self) -> str:
        """In one line, for people."""
        if not self.is_known:
            return "this onnxruntime does not tell which provider runs which node"
        n, total = len(self.fell_back), sum(self.n_nodes.values())
        if not n:
            return f"all {total} nodes run on {self.provider}"
        kinds = Counter(node.split(" ", 1)[0] for node in self.fell_back)
        listed = ", ".join(f"{n_of} {kind}" for kind, n_of in kinds.most_common(5))
        more = ", …" if len(kinds) > 5 else ""
        return f"{n} of {total} nodes fell back from {self.provider}: {listed}{more}"

    def to_json(self) -> dict[str, Any]:
        """Give plain values; of many nodes the first are named."""
        return {
            "n_nodes": dict(self.n_nodes) if self.is_known else None,
            "n_fell_back": len(self.fell_back) if self.is_known else None,
            "fell_back": list(self.fell_back[:_N_LISTED]),
        }


def placement_of(session: Any, provider: str) -> Placement:  # noqa: ANN401 - an InferenceSession
    """Ask a session, opened so that it remembers, where its nodes went; older onnxruntimes do not know."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    return count_nodes(ask() if ask is not None else (), provider)


def count_nodes(assigned: Iterable[Any], provider: str) -> Placement:
    """Count nodes by provider; ``assigned`` are onnxruntime's own subgraphs, each of one provider."""
    counts: Counter[str] = Counter()
    fell_back: list[str] = []
    for part in assigned:
        nodes = part.get_nodes()
        counts[part.ep_name] += len(nodes)
        if part.ep_name != provider:
            fell_back += [f"{node.op_type} {node.name}".strip() for node in nodes]
    return Placement(provider=provider, n_nodes=dict(sorted(counts.items())), fell_back=tuple(fell_back))
