"""What a request may need, and how many of its choices a node runs together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdserve.components.page_need import num_choices_at_once, page_need


@given(
    num_prompt=st.integers(1, 60),
    max_tokens=st.integers(1, 60),
    num_choices=st.integers(1, 130),
    page_size=st.integers(1, 17),
    num_pages=st.integers(1, 300),
    num_places=st.integers(1, 130),
)
def test_as_many_choices_at_once_as_the_node_has_room_for(
    num_prompt: int, max_tokens: int, num_choices: int, page_size: int, num_pages: int, num_places: int
) -> None:
    num = num_choices_at_once(
        num_prompt=num_prompt,
        max_tokens=max_tokens,
        num_choices=num_choices,
        page_size=page_size,
        num_pages=num_pages,
        num_places=num_places,
    )

    def fits(number: int) -> bool:
        need = page_need(
            num_prompt=num_prompt,
            num_kept=0,
            max_tokens=max_tokens,
            num_choices=number,
            page_size=page_size,
        )
        return need.total <= num_pages and number <= num_places

    assert 1 <= num <= num_choices
    assert fits(num) or not fits(1)
    assert num == num_choices or not fits(num + 1)
