"""Any plan on any layout: accel equals mask in logits, loss, gradients, cache and generation, and a batch its rows."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import vica
from tests import plans
from tests.builders import IMAGE, Row, assert_close, batch, image, text_columns, tiny_model
from vica.model import attention_accel, flow_accel, packs
from vica.plan.layer import Drop, LayerPlan

LAYERS = 4
TOLERANCE = 1e-4
parts = st.one_of(st.integers(1, 5), st.integers(1, 6).map(image))
layouts = st.lists(st.lists(parts, min_size=1, max_size=5), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right"])


def make(plan: list[LayerPlan], variant: str = "accel", **changes) -> vica.ViCAForConditionalGeneration:
    model = tiny_model(variant=variant, **changes)
    model.config.plan = plan
    return model


def both(plan: list[LayerPlan], **changes) -> list[vica.ViCAForConditionalGeneration]:
    return [make(plan, variant, **changes) for variant in ("mask", "accel")]


def asked(drawn: list[list], seed: int = 0) -> list[Row]:
    """Rows that end with text, because a ranked drop asks the last token."""
    return [Row((*p, 2) if isinstance(p[-1], tuple) else tuple(p), seed + i) for i, p in enumerate(drawn)]


def cached(cache: vica.ViCACache, layer: int, row: int, visual: bool) -> list[torch.Tensor]:
    """Keys and values that a layer holds of one row, of visual tokens or of text, in their order."""
    entries = cache.kinds[cache.layer_kinds[layer]]
    at = np.nonzero((entries.pos[row] >= 0) & (entries.visual[row] == visual))[0]
    return [x[row, :, at] for x in (cache.layers[layer].keys, cache.layers[layer].values)]


def assert_same_cache(got: vica.ViCACache, want: vica.ViCACache, plan: list[LayerPlan]) -> None:
    """mask holds visual keys in every layer; accel only where something reads them."""
    for layer, rule in enumerate(plan):
        for row in range(len(want.ids)):
            for visual in (False, True):
                mine, theirs = cached(got, layer, row, visual), cached(want, layer, row, visual)
                if visual and not (rule.updates or rule.reads):
                    assert mine[0].shape[1] == 0
                    continue
                for a, b in zip(mine, theirs):
                    assert_close(a, b, TOLERANCE, f"cache of layer {layer}, row {row}")
    assert (got.kv_lengths() == want.kv_lengths()).all()
    assert (got.closed_gaps == want.closed_gaps).all()


def assert_same_step(models, outs, inputs, plan) -> None:
    """Logits, cache, three greedy tokens."""
    mask, accel = outs
    assert_close(accel.logits, mask.logits, TOLERANCE, "logits")
    assert_same_cache(accel.past_key_values, mask.past_key_values, plan)
    columns, batch_size = inputs["attention_mask"], len(inputs["input_ids"])
    token = torch.full((batch_size, 1), 7)
    for step in range(3):
        columns = torch.cat([columns, torch.ones(batch_size, 1, dtype=torch.long)], 1)
        outs = [
            model(token, attention_mask=columns, past_key_values=out.past_key_values)
            for model, out in zip(models, outs)
        ]
        assert_close(outs[1].logits, outs[0].logits, TOLERANCE, f"decode step {step}")
        token = outs[0].logits.argmax(-1)
    assert_same_cache(outs[1].past_key_values, outs[0].past_key_values, plan)


ANY_CALL = dict(
    plan=plans.any_plan(LAYERS), rows=layouts, side=sides, extra=st.integers(0, 2), kv_heads=st.sampled_from([1, 2, 4])
)


@settings(max_examples=100)
@given(**ANY_CALL)
@torch.no_grad()
def test_accel_is_mask(plan, rows, side, extra, kv_heads):
    models = both(plan, text_config=dict(num_key_value_heads=kv_heads))
    inputs = batch(asked(rows), side, extra)
    outs = [model(**inputs, use_cache=True) for model in models]
    assert_same_step(models, outs, inputs, plan)
    assert not outs[1].logits[~text_columns(inputs)].any(), "placeholders and padding carry nothing"


@settings(max_examples=60)
@given(plan=plans.any_plan(LAYERS), rows=layouts, side=sides)
@torch.no_grad()
def test_every_row_of_a_batch_is_the_row_alone(plan, rows, side):
    model, rows = make(plan), asked(rows)
    inputs = batch(rows, side)
    together = model(**inputs, use_cache=True)
    for b, row in enumerate(rows):
        alone = model(**batch([row]), use_cache=True)
        assert_close(together.logits[b][inputs["attention_mask"][b] == 1], alone.logits[0], TOLERANCE, f"row {b}")
        lengths = together.past_key_values.kv_lengths()[:, b]
        assert (lengths == alone.past_key_values.kv_lengths()[:, 0]).all()


def train(model, inputs, labels, checkpointing: bool):
    features = [x.clone().requires_grad_() for x in inputs["image_features"] or []]
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    model.train()
    projected = [model.model.mm_projector(x) for x in features] or None
    loss = model(inputs["input_ids"], inputs["attention_mask"], image_features=projected, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, [torch.zeros_like(x) if x.grad is None else x.grad for x in features]


@settings(max_examples=60)
@given(plan=plans.any_plan(LAYERS), rows=layouts, side=sides, checkpointing=st.booleans())
def test_loss_and_every_gradient(plan, rows, side, checkpointing):
    inputs = batch(asked(rows), side)
    mask, accel = both(plan, mm_hidden_size=32)
    labels = inputs["input_ids"].clone()
    loss, want, want_features = train(mask, inputs, labels, False)
    accel_loss, got, got_features = train(accel, inputs, labels, checkpointing)
    assert_close(accel_loss, loss, TOLERANCE, "loss")
    for name in want.keys() | got.keys():
        zero = torch.zeros_like(mask.get_parameter(name))
        assert_close(got.get(name, zero), want.get(name, zero), TOLERANCE, name)
    for a, b in zip(got_features, want_features):
        assert_close(a, b, TOLERANCE, "features")


turns = st.lists(st.lists(st.lists(parts, min_size=1, max_size=3), min_size=2, max_size=2), min_size=2, max_size=3)


ANY_TALK = dict(plan=plans.any_plan(LAYERS), turns=turns, side=sides)


@settings(max_examples=60)
@given(**ANY_TALK)
@torch.no_grad()
def test_turns_on_a_cache(plan, turns, side):
    """Two sequences over two or three turns, each with or without new images, then decoding."""
    models, columns = both(plan), torch.zeros(2, 0, dtype=torch.long)
    caches: list = [None, None]
    for n, turn in enumerate(turns):
        inputs = batch(asked(turn, 10 * n), side)
        columns = torch.cat([columns, inputs["attention_mask"]], 1)
        inputs["attention_mask"] = columns
        outs = [m(**inputs, past_key_values=cache, use_cache=True) for m, cache in zip(models, caches)]
        assert_close(outs[1].logits, outs[0].logits, TOLERANCE, f"turn {n}")
        caches = [out.past_key_values for out in outs]
    assert_same_step(models, outs, inputs, plan)


@settings(max_examples=80)
@given(
    plan=plans.any_plan(LAYERS, ranked=False), rows=st.lists(st.lists(parts, min_size=2, max_size=4), min_size=2,
    max_size=2), cut=st.lists(st.integers(1, 3), min_size=2, max_size=2), variant=st.sampled_from(["accel", "mask"]),
)  # fmt: skip
@torch.no_grad()
def test_a_prompt_in_pieces(plan, rows, cut, variant):
    """Where nothing is ranked, a prompt may come in pieces, images apart from their questions."""
    model = make(plan, variant)
    whole = [Row(tuple(p), 7 + i) for i, p in enumerate(rows)]
    cache, columns, got = None, torch.zeros(2, 0, dtype=torch.long), [[], []]
    for piece in range(2):
        some = []
        for row, at in zip(whole, cut):
            at = min(at, len(row.ids) - 1)
            images = sum(i == IMAGE for i in row.ids[:at])
            part = Row((), 0)
            part.ids = row.ids[:at] if piece == 0 else row.ids[at:]
            part.images = row.images[:images] if piece == 0 else row.images[images:]
            some.append(part)
        inputs = batch(some)
        columns = torch.cat([columns, inputs["attention_mask"]], 1)
        out = model(
            inputs["input_ids"], columns, image_features=inputs["image_features"], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        for b in range(2):
            got[b].append(out.logits[b][inputs["attention_mask"][b] == 1])
    for b, row in enumerate(whole):
        want = model(**batch([row])).logits[0]
        assert_close(got[b][1], want[-len(got[b][1]) :], TOLERANCE, f"row {b}")


@pytest.mark.parametrize(
    "plan",
    [plans.fastv(LAYERS, 2, 0.5, "round"), plans.pyramiddrop(LAYERS, [1, 3], [0.5, 0.25])],
    ids=["fastv", "pyramiddrop"],
)
@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_a_ranked_drop_wants_text_behind_the_image(plan, variant):
    with pytest.raises(vica.ViCAError, match="row 1 ends with an image"):
        make(plan, variant)(**batch([Row((3, image(4), 2)), Row((3, image(4)))]))


@pytest.mark.parametrize(
    "plan, told",
    [
        ([LayerPlan()] * 3, "has 3 layers, the model 4"),
        ([LayerPlan("look")] + [LayerPlan()] * 3, "visual='look'"),
        (plans.with_drops([LayerPlan()] * 4, {1: Drop(1.5)}), "keeps 1.5"),
        (plans.with_drops([LayerPlan()] * 4, {1: Drop(0.5, "own"), 2: Drop(0.7, "own")}), "from 0 to 0.5"),
        (plans.with_drops([LayerPlan()] * 4, {1: Drop(0.5)}), "without a rank"),
        (plans.with_drops([LayerPlan()] * 4, {0: Drop(0.5, "previous")}), "attention that does not exist"),
        (plans.with_drops([LayerPlan("skip")] * 4, {1: Drop(0.5, "own")}), "attention that does not exist"),
        (plans.with_drops([LayerPlan()] * 4, {1: Drop(0.5, "random")}), "ranks by 'random'"),
        ([{"visual": "update", "speed": 9}] * 4, "speed"),
        (["update"] * 4, "must be a table"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_followed_are_refused(plan, told):
    with pytest.raises(vica.ViCAError, match=told):
        make(plan)


def test_a_plan_is_saved_with_the_model(tmp_path):
    plan = plans.pyramiddrop(LAYERS, [1, 3], [0.5, 0.25])
    model, inputs = make(plan), batch([Row((3, image(8), 4))])
    model.save_pretrained(tmp_path)
    again = vica.ViCAForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.plan == plan
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


class Watch:
    """Keeps what every layer shows: the sums over all keys, and the weights of visual keys."""

    def __init__(self):
        self.sums, self.visual = {}, {}

    def wants(self, layer):
        return layer != 1

    def take(self, layer, weights, visual):
        self.sums[layer] = weights.sum(-1)
        self.visual[layer] = [row[:, torch.from_numpy(at)] for row, at in zip(weights, visual)]


@settings(max_examples=40)
@given(plan=plans.any_plan(LAYERS), rows=layouts)
@torch.no_grad()
def test_taps_see_the_same_attention(plan, rows):
    inputs, watches = batch(asked(rows)), []
    for model in both(plan):
        watches.append(Watch())
        plain = model(**inputs).logits
        assert torch.equal(model(**inputs, taps=[watches[-1]]).logits, plain), "watching changes nothing"
    mask, accel = watches
    assert mask.sums.keys() == accel.sums.keys() and 1 not in accel.sums
    for layer, sums in accel.sums.items():
        assert_close(sums, torch.ones_like(sums), TOLERANCE, f"layer {layer}")
        for got, want in zip(accel.visual[layer], mask.visual[layer]):
            assert_close(got, want, TOLERANCE, f"layer {layer}")


FAULTS = {
    "visual tokens that read see what comes after": (
        attention_accel.LayerAttention, "_whole_runs",
        property(lambda self: self._contiguous(np.roll(self.segment.tokens.counts, 1), text_reads=True)),
    ),
    "the lowest scores stay": (
        flow_accel, "keep_highest",
        lambda scores, index, here, wanted, right=flow_accel.keep_highest: right(-scores, index, here, wanted),
    ),
    "renumbering forgets earlier turns": (
        flow_accel, "renumbered", lambda segment, start: packs.renumbered(segment, np.zeros_like(start)),
    ),
    "scattered order is taken for known": (packs.Segment, "scattered", property(lambda self: False)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    """The comparison with mask is worth something only if it fails on a wrong accel."""
    monkeypatch.setattr(*FAULTS[fault])
    test, drawn = (test_turns_on_a_cache, ANY_TALK) if "turns" in fault else (test_accel_is_mask, ANY_CALL)
    search = given(**drawn)(test.hypothesis.inner_test)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        settings(max_examples=100, database=None, phases=[Phase.generate], report_multiple_bugs=False)(search)()
