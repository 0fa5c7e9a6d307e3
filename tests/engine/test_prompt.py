"""One prompt's layout is what the model lays out for the same prompt in a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import IMAGE, VOCAB
from vica.model.layout import expand
from vica.model.prompt import VISUAL, lay_out
from vica.plan.layer import LayerPlan, updates_visual
from vica.utils.errors import ViCAError

# A prompt as parts in order: an id is a text token, a pair ("image", n) is an image of n visual tokens.
texts = st.integers(0, VOCAB - 1)
images = st.tuples(st.just("image"), st.integers(1, 5))
prompts = st.builds(lambda parts, last: [*parts, last], st.lists(st.one_of(texts, texts, images), max_size=8), texts)


def ids_and_sizes(prompt) -> tuple[list[int], list[int]]:
    ids = [IMAGE if isinstance(part, tuple) else part for part in prompt]
    return ids, [part[1] for part in prompt if isinstance(part, tuple)]


@settings(max_examples=200)
@given(batch=st.lists(prompts, min_size=1, max_size=4), left=st.booleans(), updates_visual=st.booleans())
def test_each_prompt_is_its_row_of_the_batch(batch, left, updates_visual):
    """In both forms: visual tokens as hidden states, and images beside the text."""
    width = max(map(len, batch))
    ids, valid = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), bool)
    for i, prompt in enumerate(batch):
        columns = slice(width - len(prompt), None) if left else slice(len(prompt))
        ids[i, columns], valid[i, columns] = ids_and_sizes(prompt)[0], True
    tokens = expand(ids, valid, [size for prompt in batch for size in ids_and_sizes(prompt)[1]], IMAGE)
    for i, prompt in enumerate(batch):
        layout = lay_out(*ids_and_sizes(prompt), IMAGE, VOCAB, updates_visual)
        row = tokens.row == i
        hidden = row if updates_visual else row & ~tokens.visual
        want = np.where(tokens.visual, VISUAL, ids[tokens.row, tokens.column])
        assert layout.ids.tolist() == want[hidden].tolist()
        assert layout.positions.tolist() == tokens.pos[hidden].tolist()
        assert layout.prefix == tokens.prefix[row].sum()
        assert layout.total == row.sum()
        assert_images_stand_where(layout, tokens, row, hidden)


def assert_images_stand_where(layout, tokens, row, hidden) -> None:
    """Asserts each image's place and size, and that those hidden states see it whose position is not before it."""
    covered = [layout_position for image in layout.images for layout_position in span(image)]
    assert covered == tokens.pos[row & tokens.visual].tolist()
    positions = tokens.pos[hidden]
    for image in layout.images:
        assert image.first_seen_by == np.searchsorted(positions, image.start)


def span(image) -> range:
    return range(image.start, image.start + image.size)


def test_updates_visual_looks_at_the_whole_plan():
    assert updates_visual([LayerPlan("read"), LayerPlan("update")])
    assert not updates_visual([LayerPlan("read"), LayerPlan("skip")])


@given(prompt=prompts, answer=st.lists(texts, max_size=4), updates_visual=st.booleans())
def test_a_continued_prompt_is_that_of_prompt_and_answer(prompt, answer, updates_visual):
    ids, sizes = ids_and_sizes(prompt)
    continued = lay_out(ids, sizes, IMAGE, VOCAB, updates_visual).continued(answer)
    whole = lay_out(ids + answer, sizes, IMAGE, VOCAB, updates_visual)
    assert continued.ids.tolist() == whole.ids.tolist() and continued.positions.tolist() == whole.positions.tolist()
    assert (continued.images, continued.prefix, continued.total) == (whole.images, whole.prefix, whole.total)


@pytest.mark.parametrize(
    "ids, sizes, reason",
    [
        ([5, IMAGE, 6], [], "1 image placeholders, but 0 images"),
        ([5, 6], [3], "0 image placeholders, but 1 images"),
        ([], [], "ends with an image \\(or is empty\\)"),
        ([5, IMAGE], [3], "ends with an image"),
        ([5, VOCAB], [], f"the prompt holds token {VOCAB}; the vocabulary has {VOCAB}"),
        ([5, -3], [], "the prompt holds token -3"),
        ([IMAGE, 6], [0], "an image has no visual tokens"),
    ],
)
def test_prompts_without_an_answer_are_refused(ids, sizes, reason):
    with pytest.raises(ViCAError, match=reason):
        lay_out(ids, sizes, IMAGE, VOCAB, False)
