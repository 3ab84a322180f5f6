"""Scores of classes from a pretrained model: how well each class's word completes the prompt.

Each module maps a batch of prompts (`ids`, `mask`: (batch, length) int64, padded on the right; `position`: (batch,)) to
scores (batch, classes) in fp32, whose softmax is the probability of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Prompts = Mapping[str, Tensor]


class CausalWords(nn.Module):
    """Mean log-likelihood of each word's tokens after the prompt (as in MeZO, Malladi et al. 2023, 2305.17333).

    Where all words are one token long, one pass over the prompt gives the same probabilities.

    Args:
        network: a causal language model.
        words: token ids of each class's word.
    """

    tokens: Tensor
    present: Tensor

    def __init__(self, network: nn.Module, words: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.network = network
        tokens, present = pad(words)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("present", present, persistent=False)

    def forward(self, prompts: Prompts) -> Tensor:
        """position: of the last token of each prompt."""
        ids, mask, position = prompts["ids"], prompts["mask"], prompts["position"]
        rows = torch.arange(len(ids), device=ids.device)
        classes, length = self.tokens.shape
        if length == 1:
            logits = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits[rows, position].float()[:, self.tokens[:, 0]]  # type: ignore[no-any-return]
        # Every prompt with every word behind it, in rows of their own.
        where = position[:, None, None] + 1 + torch.arange(length, device=ids.device)
        where = where.expand(-1, classes, -1).flatten(0, 1)
        words, counted = (t.expand(len(ids), -1, -1).flatten(0, 1) for t in (self.tokens, self.present))
        longer = [F.pad(t, (0, length)).repeat_interleave(classes, 0) for t in (ids, mask)]
        longer[0].scatter_(1, where, words)
        longer[1].scatter_(1, where, counted)
        logits = self.network(input_ids=longer[0], attention_mask=longer[1], use_cache=False).logits
        predicted = logits.gather(1, (where - 1)[:, :, None].expand(-1, -1, logits.shape[-1])).float()
        likelihood = F.log_softmax(predicted, -1).gather(2, words[:, :, None])[:, :, 0]
        return ((likelihood * counted).sum(1) / counted.sum(1)).view(len(ids), classes)


class MaskedWords(nn.Module):
    """Logit of each class's word at the mask token.

    Args:
        network: a masked language model.
        words: the one token id of each class's word.
    """

    tokens: Tensor

    def __init__(self, network: nn.Module, words: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("tokens", torch.tensor(words), persistent=False)

    def forward(self, prompts: Prompts) -> Tensor:
        """position: of the mask token of each prompt."""
        ids, position = prompts["ids"], prompts["position"]
        logits = self.network(input_ids=ids, attention_mask=prompts["mask"]).logits
        return logits[torch.arange(len(ids), device=ids.device), position].float()[:, self.tokens]  # type: ignore[no-any-return]


class SimilarPrompts(nn.Module):
    """Cosine similarity of a text and each class's prompt, both as means over their tokens, divided by a temperature.

    Reimers and Gurevych 2019 (1908.10084) for the embeddings. The prompts are embedded anew each time, since what
    learns changes them too.

    Args:
        network: an encoder.
        prompts: token ids of each class's prompt.
    """

    tokens: Tensor
    present: Tensor

    def __init__(self, network: nn.Module, prompts: Sequence[Sequence[int]], temperature: float) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        tokens, present = pad(prompts)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("present", present, persistent=False)

    def forward(self, prompts: Prompts) -> Tensor:
        """position: not used."""
        texts = self._embed(prompts["ids"], prompts["mask"])
        return texts @ self._embed(self.tokens, self.present).T / self.temperature

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return F.normalize((states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (rows, longest) with zeros behind them, and ones where there is a token; both int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
