"""How many KV pages a request can need on a decode node at most; decode and the router count alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageNeed:
    """The most pages that a request can ever hold: for its prompt, and by what each choice may grow."""

    prompt: int
    growth: tuple[int, ...]  # one per choice

    @property
    def total(self) -> int:
        return self.prompt + sum(self.growth)


def page_need(
    *, num_prompt: int, num_kept: int, max_tokens: int, num_choices: int, page_size: int
) -> PageNeed:
    """Of a prompt with `num_kept` tokens of output from earlier attempts, which are prefilled with it.

    Choices share the prompt's whole pages; each but the first needs a copy of the partial one. The last
    token's KV is never written, so it needs no room.
    """
    num_prefill = num_prompt + num_kept
    num_final = max(num_prefill, num_prompt + max_tokens - 1)
    prompt_pages = -(-num_prefill // page_size)
    final_pages = -(-num_final // page_size)
    first = final_pages - prompt_pages
    further = final_pages - num_prefill // page_size
    return PageNeed(prompt_pages, (first, *[further] * (num_choices - 1)))


def num_choices_at_once(
    *, num_prompt: int, max_tokens: int, num_choices: int, page_size: int, num_pages: int, num_places: int
) -> int:
    """How many of the choices one node can run together, at least 1: so many places and pages it has."""
    need = page_need(
        num_prompt=num_prompt, num_kept=0, max_tokens=max_tokens, num_choices=2, page_size=page_size
    )
    first, further = need.prompt + need.growth[0], need.growth[1]
    num_with_pages = 1 + (num_pages - first) // further if further else num_choices
    return max(1, min(num_choices, num_places, num_with_pages))
