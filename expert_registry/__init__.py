"""Versioned expert rankings, looked up by model name. Plain data: neither torch nor vLLM is imported."""

from expert_registry.accumulate import ExampleSums
from expert_registry.card import DataRef, ModelRef, RankingCard, Recommended
from expert_registry.clusters import ClusterSummary
from expert_registry.counts import RoutingCounts
from expert_registry.errors import SteerMoEError
from expert_registry.format import read_ranking, write_ranking
from expert_registry.ranking import RankedExpert, Ranking, rank_experts
from expert_registry.registry import Registry
from expert_registry.shape import MoEShape
from expert_registry.statistics import cautions, intervals, standard_errors

__all__ = [
    "ClusterSummary",
    "DataRef",
    "ExampleSums",
    "MoEShape",
    "ModelRef",
    "RankedExpert",
    "Ranking",
    "RankingCard",
    "Recommended",
    "Registry",
    "RoutingCounts",
    "SteerMoEError",
    "cautions",
    "intervals",
    "rank_experts",
    "read_ranking",
    "standard_errors",
    "write_ranking",
]
