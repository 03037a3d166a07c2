"""Greedy and beam search a step at a time, with a state that has a first dimension of rows and nothing else of a batch.

Each step is the one of `generate`, so that a row is given the same tokens whatever rows are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

NEVER = -1e9  # a score that no text has


@dataclass(frozen=True)
class SearchSettings:
    """What a search follows, as `generate` prepares it.

    Args:
        max_new_tokens: Limit on the new tokens.
        end_ids: That end a text, `(ids,)`; may be empty.
        pad_token_id: Fills what follows a text.
        processors: Of the scores: a function of ids and scores, `(rows, tokens)` and `(rows, vocabulary)`.
        num_beams: 1 for greedy search.
        early_stopping: As in `GenerationConfig`.
        length_penalty: The same.
    """

    max_new_tokens: int
    end_ids: torch.Tensor
    pad_token_id: int
    processors: Any
    num_beams: int
    early_stopping: bool | str
    length_penalty: float


class Search(Protocol):
    """One way to choose tokens. The state is changed in place."""

    settings: SearchSettings

    def start(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state for rows whose decoder begins with `ids`, `(rows * beams, tokens)`."""

    def ids(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """All ids of the rows of the model, `(rows * beams, tokens)`, without the prompts of a decoder-only model."""

    def step(self, state: dict[str, torch.Tensor], new_tokens: int, logits: torch.Tensor) -> torch.Tensor | None:
        """Choose the token that makes `new_tokens` of them from float32 `logits`, `(rows * beams, vocabulary)`.

        Returns:
            The row of the model that each one continues, `(rows * beams,)`; `None` where each continues itself.
        """

    def is_done(self, state: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """Whether nothing can change the text of a row, `(rows,)`."""

    def texts(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """The text of each row, `(rows, tokens)`."""


class GreedySearch:
    """The most likely token."""

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings

    def start(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Search`."""
        return {"ids": ids, "has_ended": torch.zeros(len(ids), dtype=torch.bool, device=ids.device)}

    def ids(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Search`."""
        return state["ids"]

    def step(self, state: dict[str, torch.Tensor], new_tokens: int, logits: torch.Tensor) -> None:
        """See `Search`."""
        tokens = self.settings.processors(state["ids"], logits).argmax(dim=-1)
        tokens = tokens.masked_fill(state["has_ended"], self.settings.pad_token_id)
        state["ids"] = torch.cat([state["ids"], tokens[:, None]], dim=1)
        state["has_ended"] = state["has_ended"] | torch.isin(tokens, self.settings.end_ids)

    def is_done(self, state: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """See `Search`."""
        return state["has_ended"] | (new_tokens >= self.settings.max_new_tokens)

    def texts(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Search`."""
        return state["ids"]


class BeamSearch:
    """The best text of several that are continued beside each other.

    The state: `running`, `(rows, beams, tokens)`, and their `scores`, `(rows, beams)`, best first; the best texts that
    have `ended`, `ended_scores` and `has_ended` with the same shapes; `can_improve`, `(rows, 1)`.
    """

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings
        self.candidates = max(2, 1 + len(settings.end_ids)) * settings.num_beams

    def start(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Search`."""
        running = ids.unflatten(0, (-1, self.settings.num_beams))
        scores = torch.zeros(running.shape[:2], device=ids.device)
        scores[:, 1:] = NEVER  # all beams are the same until they differ by a token
        return {
            "running": running,
            "scores": scores,
            "ended": running,
            "ended_scores": torch.full_like(scores, NEVER),
            "has_ended": torch.zeros_like(scores, dtype=torch.bool),
            "can_improve": torch.ones_like(scores[:, :1], dtype=torch.bool),
        }

    def ids(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Search`."""
        return state["running"].flatten(0, 1)

    def step(self, state: dict[str, torch.Tensor], new_tokens: int, logits: torch.Tensor) -> torch.Tensor:
        """See `Search`."""
        rows, beams = state["scores"].shape
        log_probs = self.settings.processors(self.ids(state), torch.log_softmax(logits, dim=-1))
        vocabulary = log_probs.shape[-1]
        totals = log_probs.unflatten(0, (rows, beams)) + state["scores"][:, :, None]
        scores, places = totals.flatten(1).topk(self.candidates)
        beam, tokens = places // vocabulary, places % vocabulary
        texts = torch.cat([_chosen(state["running"], beam), tokens[:, :, None]], dim=2)
        ends = torch.isin(tokens, self.settings.end_ids) | (new_tokens >= self.settings.max_new_tokens)

        going_on = scores + ends.to(scores.dtype) * NEVER
        next_beams = going_on.topk(beams)[1]
        state["running"], state["scores"] = _chosen(texts, next_beams), _chosen(going_on, next_beams)
        self._keep_ended(state, texts, scores, ends, new_tokens)
        self._judge(state, new_tokens)
        offsets = torch.arange(rows, device=beam.device)[:, None] * beams
        return (_chosen(beam, next_beams) + offsets).flatten()

    def _keep_ended(
        self,
        state: dict[str, torch.Tensor],
        texts: torch.Tensor,
        scores: torch.Tensor,
        ends: torch.Tensor,
        new_tokens: int,
    ) -> None:
        """Of the texts that ended before and now, keep the best; only those that end among the best beams count."""
        beams = self.settings.num_beams
        counts = ends & (torch.arange(ends.shape[1], device=ends.device) < beams)
        is_full = state["has_ended"].all(dim=1, keepdim=True) & (self.settings.early_stopping is True)
        final = scores / (new_tokens**self.settings.length_penalty)
        for is_shut_out in (is_full, ~state["can_improve"], ~counts):
            final = final + is_shut_out.to(final.dtype) * NEVER
        filled = torch.nn.functional.pad(state["ended"], (0, 1), value=self.settings.pad_token_id)
        all_scores = torch.cat([state["ended_scores"], final], dim=1)
        best = all_scores.topk(beams)[1]
        state["ended"] = _chosen(torch.cat([filled, texts], dim=1), best)
        state["ended_scores"] = _chosen(all_scores, best)
        state["has_ended"] = _chosen(torch.cat([state["has_ended"], counts], dim=1), best)

    def _judge(self, state: dict[str, torch.Tensor], new_tokens: int) -> None:
        """Whether what goes on can become better than the worst text that has ended."""
        settings = self.settings
        longest = settings.early_stopping == "never" and settings.length_penalty > 0.0
        length = settings.max_new_tokens if longest else new_tokens
        best = state["scores"][:, :1] / (length**settings.length_penalty)
        worst = torch.where(state["has_ended"], state["ended_scores"].min(dim=1, keepdim=True)[0], NEVER)
        state["can_improve"] = state["can_improve"] & (best > worst).any(dim=1, keepdim=True)

    def is_done(self, state: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """See `Search`."""
        is_full = state["has_ended"].all(dim=1) & (self.settings.early_stopping is True)
        return ~state["can_improve"][:, 0] | is_full | (new_tokens >= self.settings.max_new_tokens)

    def texts(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Search`."""
        return state["ended"][:, 0]


def _chosen(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Entries of the second dimension of `values` at `places`, `(rows, chosen)`."""
    return values.gather(1, places) if values.ndim == 2 else values.take_along_dim(places[:, :, None], dim=1)
