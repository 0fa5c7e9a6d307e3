"""accel is exactly mask: logits, loss, gradients, cache and generation, in every layout."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import IMAGE, LAYOUTS, VOCAB, Row, assert_close, batch, image, text_columns, tiny_model

parts = st.one_of(st.integers(1, 6), st.integers(1, 7).map(image))
rules = st.one_of(st.booleans(), st.integers(0, 4))
LAYER_SETS = {"none": [], "first": [0], "last": [7], "all": list(range(8)), "7B-like": [0, 1, 3, 4, 5]}
PREFIX_RULES = [True, False, 3]


@pytest.fixture(scope="module")
def model():
    return tiny_model(text_config=dict(num_hidden_layers=8), t2v_layers=[0])


def both(model, inputs, **kwargs):
    outs = []
    for variant in ("mask", "accel"):
        model.set_variant(variant)
        with torch.no_grad():
            outs.append(model(**inputs, **kwargs))
    return outs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", PREFIX_RULES)
@pytest.mark.parametrize("layers", LAYER_SETS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits(model, layout, layers, rule, side):
    model.set_variant("mask", LAYER_SETS[layers], rule)
    inputs = batch(LAYOUTS[layout], side, extra=1)
    mask, accel = both(model, inputs)
    assert_close(accel.logits, mask.logits)
    assert not accel.logits[~text_columns(inputs)].any(), "placeholders and padding carry nothing"


def loss_and_gradients(model, inputs, labels, checkpointing: bool):
    features = [x.clone().requires_grad_() for x in inputs["image_features"] or []]
    projected = [model.model.mm_projector(x) for x in features] or None
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    model.train()
    model.zero_grad(set_to_none=False)
    loss = model(inputs["input_ids"], inputs["attention_mask"], image_features=projected, labels=labels).loss
    loss.backward()
    model.eval()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, [torch.zeros_like(x) if x.grad is None else x.grad for x in features]


def assert_same_training(trained, inputs, checkpointing: bool) -> dict:
    """Loss, gradients of all weights and of the features; returns mask's gradients."""
    labels = inputs["input_ids"].clone()  # placeholders and padding among them: they must not count
    results = {}
    for variant, saved in (("mask", False), ("accel", checkpointing)):
        trained.set_variant(variant)
        results[variant] = loss_and_gradients(trained, inputs, labels, saved)
    (loss, want, want_inputs), (accel_loss, got, got_inputs) = results["mask"], results["accel"]
    assert_close(accel_loss, loss, what="loss")
    for name in want.keys() | got.keys():
        zero = torch.zeros_like(trained.get_parameter(name))
        assert_close(got.get(name, zero), want.get(name, zero), what=name)
    for g, w in zip(got_inputs, want_inputs):
        assert_close(g, w, what="features")
    return want


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("rule", PREFIX_RULES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "layout", ["unequal numbers of images", "ragged lengths", "image first", "image last", "no image", "uniform"]
)
def test_loss_and_every_gradient(layout, side, rule, checkpointing):
    trained = tiny_model(mm_hidden_size=32, t2v_layers=[0, 3], freeze_prefix=rule)
    want = assert_same_training(trained, batch(LAYOUTS[layout], side), checkpointing)
    if layout == "ragged lengths":
        assert want["model.mm_projector.0.weight"].abs().max() > 1e-4, "the projector learns"


@settings(max_examples=50)
@given(
    rows=st.lists(st.lists(parts, min_size=1, max_size=4), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    layers=st.lists(st.integers(0, 3), unique=True),
    rule=rules,
    kv_heads=st.sampled_from([1, 2, 4]),
    checkpointing=st.booleans(),
)
def test_training_in_any_layout(rows, side, layers, rule, kv_heads, checkpointing):
    shape = dict(num_key_value_heads=kv_heads, attention_bias=True)
    trained = tiny_model(mm_hidden_size=32, t2v_layers=layers, freeze_prefix=rule, text_config=shape)
    assert_same_training(trained, batch([Row(tuple(p), i) for i, p in enumerate(rows)], side), checkpointing)


def test_loss_counts_only_text_that_follows_text():
    model = tiny_model()
    inputs = batch([Row((3, image(4), 3)), Row((2,), 1)], "right")
    labels = inputs["input_ids"].clone()
    logits = model(**inputs).logits
    pairs = [(0, 0), (0, 1), (0, 4), (0, 5), (1, 0)]  # (row, column) that predict the next column
    want = torch.stack([-logits[b, t].log_softmax(-1)[labels[b, t + 1]] for b, t in pairs]).mean()
    assert_close(model(**inputs, labels=labels).loss, want)
    by_items = model(**inputs, labels=labels, num_items_in_batch=10).loss
    assert_close(by_items, want * len(pairs) / 10)


def test_training_under_autocast():
    """float32 weights, bfloat16 products: every step of accel has one dtype, and its loss is mask's."""
    model = tiny_model(freeze_prefix=2).train()
    inputs = batch(LAYOUTS["unequal numbers of images"], "right")
    losses = []
    for variant in ("mask", "accel"):
        model.set_variant(variant)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
        losses[-1].backward()
    assert losses[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        held = model(**inputs, use_cache=True).past_key_values.layers[0]
    assert held.keys.dtype == held.values.dtype == torch.bfloat16
    assert_close(losses[1], losses[0], 0.02)


def test_a_given_cache_is_used_whatever_use_cache_says():
    model, row = tiny_model(), Row((3, image(4), 5))
    with torch.no_grad():
        cache = model(**batch([row]), use_cache=True).past_key_values
        got = model(torch.tensor([[7]]), past_key_values=cache, use_cache=False).logits
        whole = model(torch.tensor([[*row.ids, 7]]), image_features=row.images).logits[:, -1:]
    assert_close(got, whole)


def test_checkpointing_drops_the_cache(caplog):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    assert model(**batch([Row((3, image(4), 5))]), use_cache=True).past_key_values is None
    assert "use_cache=False" in caplog.text


@pytest.mark.parametrize("layers", LAYER_SETS, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "layout", ["unequal numbers of images", "ragged lengths", "two images", "no image", "text beside image"]
)
def test_generated_tokens(model, layout, layers, side, beams):
    model.set_variant("mask", LAYER_SETS[layers], side == "left")
    inputs = batch(LAYOUTS[layout], side)
    outs = []
    for variant in ("mask", "accel"):
        model.set_variant(variant)
        outs.append(
            model.generate(
                **inputs, max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        )
    assert torch.equal(*outs)
    assert torch.equal(outs[0][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@torch.no_grad()
def decode(model, inputs, steps: torch.Tensor):
    """Logits of prefill and of each forced step."""
    out = model(**inputs, use_cache=True)
    logits, mask = [out.logits], inputs["attention_mask"]
    for token in steps.T:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(token[:, None], attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "layout", ["unequal numbers of images", "ragged lengths", "images of different sizes", "text beside image"]
)
def test_a_row_of_a_batch_equals_the_row_alone(layout, side, variant):
    model = tiny_model(variant=variant, freeze_prefix=2)
    rows = LAYOUTS[layout]
    steps = torch.randint(3, VOCAB, (len(rows), 4), generator=torch.Generator().manual_seed(5))
    inputs = batch(rows, side)
    together = decode(model, inputs, steps)
    for b, row in enumerate(rows):
        alone = decode(model, batch([row]), steps[b : b + 1])
        here = inputs["attention_mask"][b] == 1
        assert_close(together[0][b][here], alone[0][0], what=f"prefill of row {b}")
        for i in range(steps.shape[1]):
            assert_close(together[i + 1][b], alone[i + 1][0], what=f"step {i} of row {b}")


@torch.no_grad()
def in_pieces(model, row: Row, cuts: list[int]) -> torch.Tensor:
    cache, logits, images = None, [], list(row.images)
    for start, end in zip([0, *cuts], [*cuts, len(row.ids)]):
        ids = torch.tensor([row.ids[start:end]])
        count = int((ids == IMAGE).sum())
        piece, images = images[:count], images[count:]
        out = model(ids, image_features=piece or None, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("rule", PREFIX_RULES)
@pytest.mark.parametrize(
    "layout", ["image in the middle", "two images", "three images, two side by side", "image first", "no image"]
)
@torch.no_grad()
def test_prefill_in_pieces_equals_prefill_at_once(layout, rule, variant):
    model = tiny_model(variant=variant, freeze_prefix=rule)
    row = LAYOUTS[layout][0]
    whole = model(torch.tensor([row.ids]), image_features=row.images or None).logits
    first_image = row.ids.index(IMAGE) if row.images else 0
    for cuts in ([1], [3], [5], [2, 6], list(range(1, len(row.ids)))):
        cuts = [c for c in cuts if c < len(row.ids)]
        got = in_pieces(model, row, cuts)
        # Text that goes in before any image is in sight is answered as plain text; all that follows is exact.
        settled = next((c for c in reversed(cuts) if c <= first_image), 0)
        assert_close(got[:, settled:], whole[:, settled:], what=f"cuts {cuts}")


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_second_turn_with_new_images_equals_the_whole(side, variant):
    """Row 1 has had no image before its second turn brings one, row 2 never has one."""
    model = tiny_model(variant=variant, freeze_prefix=2)
    first = [Row((3, image(4), 5)), Row((6,), 1), Row((2,), 2)]
    second = [Row((2, image(3), 3), 3), Row((3, image(6), 2), 4), Row((4,), 5)]
    one, two = batch(first, side), batch(second, side)
    cache = model(**one, use_cache=True).past_key_values
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    got = model(
        two["input_ids"], attention_mask=mask, image_features=two["image_features"], past_key_values=cache
    ).logits
    for b, (x, y) in enumerate(zip(first, second)):
        ids = torch.tensor([x.ids + y.ids])
        whole = model(ids, image_features=(x.images + y.images) or None).logits[0, len(x.ids) :]
        assert_close(got[b][two["attention_mask"][b] == 1], whole, what=f"row {b}")


@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [3]], ids=str)
@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_a_row_may_see_its_first_image_late(variant, layers):
    """Row 1's image comes in the second turn, after text was generated: its prefix is made anew in every layer, though
    T2V layers and others keep their holes in different places."""
    model = tiny_model(variant=variant, t2v_layers=layers)
    one, two = [Row((1, image(2), 1)), Row((3,), 1)], [Row((3,), 2), Row((1, image(3), 1), 3)]
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True)
    first = model.generate(**batch(one), **options)
    ids = torch.cat([first.sequences, torch.tensor([r.ids for r in two])], 1)
    options |= dict(output_logits=True)
    got = model.generate(ids, image_features=two[1].images, past_key_values=first.past_key_values, **options)
    whole = model.generate(ids, image_features=one[0].images + two[1].images, **options)
    assert torch.equal(got.sequences, whole.sequences)
    for a, b in zip(got.logits, whole.logits):
        assert_close(a, b)


turns = st.lists(st.lists(st.lists(parts, min_size=1, max_size=3), min_size=2, max_size=2), min_size=2, max_size=3)


@settings(max_examples=60)
@given(
    turns=turns, side=st.sampled_from(["left", "right"]), layers=st.lists(st.integers(0, 3), unique=True), rule=rules
)
def test_any_talk(turns, side, layers, rule):
    """Two rows over two or three turns, images anywhere: the last turn equals each row's whole conversation alone."""
    model = tiny_model(t2v_layers=layers, freeze_prefix=rule)
    mask, cache, history = torch.zeros(2, 0, dtype=torch.long), None, ([], [])
    for n, turn in enumerate(turns):
        talk = [Row(tuple(p), 10 * n + b) for b, p in enumerate(turn)]
        inputs = batch(talk, side)
        mask = torch.cat([mask, inputs["attention_mask"]], 1)
        with torch.no_grad():
            out = model(**{**inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for b, row in enumerate(talk):
            history[b].append(row)
    for b, said in enumerate(history):
        ids = torch.tensor([[i for row in said for i in row.ids]])
        with torch.no_grad():
            whole = model(ids, image_features=[x for row in said for x in row.images] or None).logits[0]
        assert_close(out.logits[b][inputs["attention_mask"][b] == 1], whole[-len(said[-1].ids) :], what=f"row {b}")


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_generate_goes_on_from_a_cache(variant):
    """The next turn gives the whole conversation's ids and images with the first turn's cache."""
    model = tiny_model(variant=variant)
    one, more = Row((3, image(4), 5)), Row((2, image(3), 3), 1)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    first = model.generate(**batch([one]), **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([more.ids])], 1)
    whole = model.generate(ids, image_features=one.images + more.images, **options)
    for images in (one.images + more.images, more.images):
        cache = copy.deepcopy(first.past_key_values)
        assert torch.equal(model.generate(ids, image_features=images, past_key_values=cache, **options), whole)


rows = st.lists(st.lists(parts, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=120)
@given(
    rows=rows,
    side=st.sampled_from(["left", "right"]),
    layers=st.lists(st.integers(0, 3), unique=True, max_size=4),
    rule=rules,
    kv_heads=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    extra=st.integers(0, 2),
)
def test_any_layout(rows, side, layers, rule, kv_heads, bias, extra):
    model = tiny_model(
        text_config=dict(num_key_value_heads=kv_heads, attention_bias=bias), t2v_layers=layers, freeze_prefix=rule
    )
    inputs = batch([Row(tuple(p), i) for i, p in enumerate(rows)], side, extra)
    mask, accel = both(model, inputs, use_cache=True)
    assert_close(accel.logits, mask.logits, what="prefill")
    token = torch.full((len(rows), 1), 7)
    longer = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 1, dtype=torch.long)], 1)
    steps = []
    for variant, out in (("mask", mask), ("accel", accel)):
        model.set_variant(variant)
        with torch.no_grad():
            steps.append(model(token, attention_mask=longer, past_key_values=out.past_key_values).logits)
    assert_close(steps[1], steps[0], what="decode")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation):
    inputs = batch(LAYOUTS["unequal numbers of images"], "right")
    want = tiny_model()(**inputs).logits
    model = tiny_model()
    model.set_attn_implementation(implementation)
    for variant in ("accel", "mask"):
        model.set_variant(variant)
        assert_close(model(**inputs).logits, want)
        step = model(torch.full((3, 1), 5), past_key_values=model(**inputs).past_key_values)
        assert torch.isfinite(step.logits).all()
