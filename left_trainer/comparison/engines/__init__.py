"""What runs the cells of a comparison: this machine, or a cluster on which other machines see the same folder."""

from left_trainer.comparison.engines.engine import ENGINES, Engine, Pending, make_engine

__all__ = ["ENGINES", "Engine", "Pending", "make_engine"]
